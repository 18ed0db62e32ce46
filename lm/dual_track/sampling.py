"""Sample one track of a whole song from the other, window by window, with classifier-free guidance.

Windows of 30 s are stitched by the mechanism that continues a prefix: the last codes of what is done become
the prefix of the next window. All candidates of a song, each with and without the source for guidance, are
computed side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...tokenizer.common.errors import DataError
from ..sheet.columns import check_sheet, commit
from .choice import SamplingConfig, draw_uniform
from .layout import MODES, mode_into
from .model import DualTrackLM
from .window import WindowSampler


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Sampled codes and how likely the model found them, a by-product of sampling.

    Log-probabilities are means over the sampled codes (given ones do not count), in nats per code, before
    temperature, top-k and top-p; None where nothing was sampled or, without guidance, not computed.
    """

    codes: Tensor  # [candidates, frames] int64
    likelihood_nats: Tensor | None  # [candidates] with the source
    likelihood_alone_nats: Tensor | None  # [candidates] without it, needs guidance other than 1

    @property
    def information_nats(self) -> Tensor | None:
        """Pointwise mutual information with the source [candidates], in nats per code."""
        if self.likelihood_nats is None or self.likelihood_alone_nats is None:
            return None
        return self.likelihood_nats - self.likelihood_alone_nats


def generate_track(
    lm: DualTrackLM,
    vocal_codes: Tensor,
    *,
    prefix_codes: Tensor | None = None,
    guidance: float = SamplingConfig.guidance,
    temperature: float = SamplingConfig.temperature,
    top_k: int = SamplingConfig.top_k,
    top_p: float = SamplingConfig.top_p,
    seed: int,
    window_frames: int = SamplingConfig.window_frames,
    overlap_frames: int = SamplingConfig.overlap_frames,
    progress: Callable[[int], None] | None = None,
    track: str = "accompaniment",
) -> Tensor:
    """Return codes [frames] of the accompaniment (or `track`) for the codes [frames] of the other track.

    vocal_codes: codes of the source, one frame or more. prefix_codes [k]: given codes, the output starts with
    them. progress is called with the number of frames finished so far. The same seed gives the same codes.
    """
    config = SamplingConfig(
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        window_frames=window_frames,
        overlap_frames=overlap_frames,
    )
    return generate_candidates(
        lm,
        vocal_codes,
        seeds=[seed],
        config=config,
        prefix_codes=prefix_codes,
        progress=progress,
        track=track,
    ).codes[0]


@torch.no_grad()
def generate_candidates(
    lm: DualTrackLM,
    source_codes: Tensor,
    *,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    prefix_codes: Tensor | None = None,
    sheet: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    track: str = "accompaniment",
) -> Candidates:
    """Return one candidate of `track` per seed, all computed in one batch.

    sheet [frames, COLUMNS]: the lead sheet; None: as the model reads it out of the whole vocal, if it can.
    However sure the reader was, the band commits to it. A seed gives the same candidate whatever the others
    are.
    """
    config = config or SamplingConfig()
    mode = mode_into(track)
    source = MODES[mode][0]
    assert source is not None
    source_codes = _check_codes(lm, source_codes, source).to(lm.device)
    prefix = _check_codes(lm, prefix_codes, track) if prefix_codes is not None else torch.zeros(0).long()
    if not seeds or not len(source_codes):
        raise DataError("give at least one seed and one frame of source codes")
    frames = len(source_codes)
    done = prefix[:frames].expand(len(seeds), -1).to(lm.device)
    sampled = frames - done.shape[1]
    if not sampled:
        return Candidates(codes=done.cpu(), likelihood_nats=None, likelihood_alone_nats=None)
    if sheet is not None:
        sheet = commit(check_sheet(sheet, frames)).to(lm.device)
    elif source == "vocal" and lm.sheet_reader is not None:
        sheet = commit(lm.sheet_reader.read(source_codes[None])[0])
    uniform = torch.stack([draw_uniform(seed, frames) for seed in seeds]).to(lm.device)
    sampler = WindowSampler(lm, mode, len(seeds), config, min(frames, config.window_frames))
    nats = torch.zeros(sampler.branches, len(seeds), device=lm.device)
    while done.shape[1] < frames:
        start = next_window_start(done.shape[1], frames, config)
        window = slice(start, start + config.window_frames)
        report = None if progress is None else _offset(progress, start)
        notes = None if sheet is None else sheet[window]
        codes, likely = sampler.sample(
            source_codes[window], done[:, start:], uniform[:, window], report, notes
        )
        done, nats = torch.cat([done[:, :start], codes], dim=1), nats + likely
    means = (nats / sampled).cpu()
    return Candidates(
        codes=done.cpu(), likelihood_nats=means[0], likelihood_alone_nats=means[1] if len(means) > 1 else None
    )


def next_window_start(done_frames: int, frames: int, config: SamplingConfig) -> int:
    """Return where the window begins that continues done_frames of a song of `frames`.

    The last window is moved back to be a whole one, so that its codes have as much past as the others'.
    """
    if done_frames + max(1, config.overlap_frames) <= config.window_frames:
        return 0  # a beginning, or a given prefix that leaves room in the first window
    return max(0, min(done_frames - config.overlap_frames, frames - config.window_frames))


def _check_codes(lm: DualTrackLM, codes: Tensor, track: str) -> Tensor:
    if codes.ndim != 1:
        raise DataError(f"{track} codes must be [frames], got shape {tuple(codes.shape)}")
    size = lm.codes_of(track).codes
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= size):
        raise DataError(
            f"{track} codes must be in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}; "
            f"encode them with the tokenizer of this model"
        )
    return codes.long()


def _offset(progress: Callable[[int], None], start: int) -> Callable[[int], None]:
    return lambda frames: progress(start + frames)
