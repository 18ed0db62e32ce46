"""Sample one track of a whole song from the other, window by window, with classifier-free guidance.

Windows of 30 s are stitched by the mechanism that continues a prefix: the last codes of what is done become
the prefix of the next window. All candidates of a song, each with and without the source for guidance, are
computed side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..tokenizer.common.errors import ConfigError, DataError
from .decoding import CachedDecoder
from .layout import MODES, PROMPT, TARGET_SEGMENT, TRACKS, mode_into
from .model import DualTrackLM


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of sampling and stitching."""

    guidance: float = 1.5  # logits = without + guidance * (with - without); 1 turns guidance off
    temperature: float = 0.95  # 0 takes the most likely code
    top_k: int = 100  # most likely codes kept; 0 keeps all
    top_p: float = 0.95  # smallest set of codes with this probability is kept; 1 keeps all
    window_frames: int = 750
    overlap_frames: int = 50  # codes of the last window that the next one continues

    def __post_init__(self) -> None:
        if self.guidance < 0:
            raise ConfigError(f"guidance must not be negative, got {self.guidance}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.overlap_frames < self.window_frames:
            raise ConfigError(
                f"overlap_frames must be in 0..window_frames - 1, "
                f"got {self.overlap_frames} of {self.window_frames}"
            )


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
    )[0]


@torch.no_grad()
def generate_candidates(
    lm: DualTrackLM,
    source_codes: Tensor,
    *,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    prefix_codes: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    track: str = "accompaniment",
) -> Tensor:
    """Return codes [candidates, frames] of `track`, one candidate per seed, all in one batch."""
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
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler = _WindowSampler(lm, mode, len(seeds), config, min(frames, config.window_frames))
    while done.shape[1] < frames:
        start = next_window_start(done.shape[1], frames, config)
        window = source_codes[start : start + config.window_frames]
        given = done[:, start:]
        report = None if progress is None else _offset(progress, start)
        done = torch.cat([done[:, :start], sampler.sample(window, given, generators, report)], dim=1)
    return done.cpu()


def next_window_start(done_frames: int, frames: int, config: SamplingConfig) -> int:
    """Return where the window begins that continues done_frames of a song of `frames`.

    The last window is moved back to be a whole one, so that its codes have as much past as the others'.
    """
    if done_frames + max(1, config.overlap_frames) <= config.window_frames:
        return 0  # a beginning, or a given prefix that leaves room in the first window
    return max(0, min(done_frames - config.overlap_frames, frames - config.window_frames))


def pick_codes(logits: Tensor, generators: Sequence[torch.Generator], config: SamplingConfig) -> Tensor:
    """Return one code [rows] per row of logits [rows, codes]; each row draws from its own generator."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float().cpu() / config.temperature
    kept = min(config.top_k or logits.shape[-1], logits.shape[-1])
    values, codes = logits.topk(kept, dim=-1)  # in falling order
    probabilities = values.softmax(dim=-1)
    # A code stays while the codes before it do not reach top_p together; the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = torch.where(before < config.top_p, probabilities, 0.0)
    draws = torch.stack(
        [torch.multinomial(row, 1, generator=g)[0] for row, g in zip(probabilities, generators, strict=True)]
    )
    return codes.gather(1, draws[:, None])[:, 0]


class _WindowSampler:
    """Samples windows; keeps the buffers and the fused tables between them."""

    def __init__(
        self, lm: DualTrackLM, mode: str, candidates: int, config: SamplingConfig, longest_window: int
    ) -> None:
        self.lm, self.mode, self.config, self.candidates = lm, mode, config, candidates
        source, (self.target,) = MODES[mode]
        assert source is not None
        self.source = source
        self.is_guided = config.guidance != 1.0
        rows = candidates * (2 if self.is_guided else 1)
        self._decoder = CachedDecoder(lm, rows, capacity=2 * longest_window)
        self._tables = {track: _input_table(lm, track) for track in TRACKS}
        head = lm.codes_of(self.target)
        self._head = head.vectors @ head.anchor_out.weight + head.residual_out.weight  # [codes, hidden_dim]
        self._head_bias = head.residual_out.bias

    def sample(
        self,
        source: Tensor,
        given: Tensor,
        generators: Sequence[torch.Generator],
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """Continue `given` [candidates, k] to the length of source [frames]; return [candidates, frames]."""
        frames, pad = len(source), self.lm.pads
        # Rows: the candidates with the source, then (guided) the same candidates without it.
        heard = source.expand(self.candidates, frames)
        absent = torch.full_like(heard, pad[self.source])
        sources = torch.cat([heard, absent]) if self.is_guided else heard
        copies = len(sources) // self.candidates
        aligned = sources if self.lm.config.aligned_source else torch.full_like(sources, pad[self.source])
        self._decoder.reset()
        self._decoder.advance(self._embed(sources, torch.full_like(sources, pad[self.target]), PROMPT), 0)
        first = torch.full((self.candidates, 1), pad[self.target], device=source.device)
        past = torch.cat([first, given], dim=1)  # inputs of the steps that predict frames 0..k
        codes, position = [given], 0
        while position + past.shape[1] <= frames:
            stop = position + past.shape[1]
            step = self._embed(aligned[:, position:stop], past.repeat(copies, 1), TARGET_SEGMENT[self.mode])
            hidden = self._decoder.advance(step, position)[:, -1]
            chosen = pick_codes(self._logits(hidden), generators, self.config).to(source.device)
            codes.append(chosen[:, None])
            past, position = chosen[:, None], stop
            if progress is not None:
                progress(stop)
        return torch.cat(codes, dim=1)

    def _embed(self, source: Tensor, target: Tensor, segment: int) -> Tensor:
        inputs = self._tables[self.source][source] + self._tables[self.target][target]
        return inputs + (self.lm.project.bias + self.lm.segments.weight[segment])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = functional.linear(hidden, self._head, self._head_bias)
        if not self.is_guided:
            return logits
        given, absent = logits.chunk(2)
        return absent + self.config.guidance * (given - absent)


def _input_table(lm: DualTrackLM, track: str) -> Tensor:
    """Return [codes + 1, hidden_dim]: what each code of the track adds to a step's input (eq. 24)."""
    codes = lm.codes_of(track)
    width = lm.config.embedding_dim
    first = TRACKS.index(track) * width
    everything = torch.arange(codes.codes + 1, device=lm.device)
    return functional.linear(codes.embed(everything), lm.project.weight[:, first : first + width])


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
