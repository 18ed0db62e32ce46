"""Sampling a song's codes: classifier-free guidance, window stitching, and how one code is chosen.

Window stitching: windows of 30 s follow each other by the mechanism that continues a prefix: the last codes
of what is done become the prefix of the next window. All candidates of a song, each with and without the
source for classifier-free guidance, are computed side by side, all of it on the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import SamplingConfig
from ..sheet.columns import LeadSheetEmbedding, hide_playing, unknown_sheet
from .backbone import Qwen2Backbone
from .decoding import CachedDecoder


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """A model's weights as sampling one track from the other needs them, fused to tables once."""

    backbone: Qwen2Backbone
    shared_positions: bool
    aligned_source: bool
    sources: Tensor  # [codes + 1, hidden_dim] what a code of the source adds to a step's input, PAD last
    targets: Tensor  # [codes + 1, hidden_dim] the same of the target, with what is in every target step
    prompt: Tensor  # [hidden_dim] what is in every prompt step beside the source's code
    head: Tensor  # [codes, hidden_dim] of the target's logits
    head_bias: Tensor  # [codes]
    sheet: LeadSheetEmbedding | None


_FOLLOWED_FRAMES = 25  # between two looks at the codes so far
_LIKELY = 256  # codes that are put in order first: what is drawn is nearly always one of them


def pick_codes(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> Tensor:
    """Return a code per row of logits [rows, codes], by numbers in [0, 1) [rows]; waits for no device."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    if config.temperature != 1:
        logits = logits / config.temperature
    kept = min(config.top_k or logits.shape[-1], logits.shape[-1])
    if config.top_p == 1 and kept == logits.shape[-1] > _LIKELY and logits.device.type == "cpu":
        # The codes in falling order up to the drawn share, without the order of those that follow.
        probabilities, codes = logits.float().softmax(dim=-1).topk(_LIKELY, dim=-1)
        through = probabilities.cumsum(dim=-1)
        if bool((through[:, -1] > uniform).all()):
            place = (through - probabilities <= uniform[:, None]).sum(dim=-1, keepdim=True) - 1
            return codes.gather(1, place)[:, 0]
    values, codes = logits.float().topk(kept, dim=-1)  # in falling order
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # A code stays while the codes before it do not reach top_p together; the first always stays.
    allowed = before < config.top_p
    total = (probabilities * allowed).sum(dim=-1, keepdim=True)
    # The last code that begins at or below the drawn share: the first begins at 0, so there is one.
    reached = (before <= uniform[:, None] * total) & allowed
    return codes.gather(1, reached.sum(dim=-1, keepdim=True) - 1)[:, 0]


def draw_uniform(seed: int, frames: int) -> Tensor:
    """Return the numbers in [0, 1) that a candidate is drawn by, one per frame of the song: [frames]."""
    return torch.rand(frames, generator=torch.Generator().manual_seed(seed))


class WindowSampler:
    """Samples windows of one length; keeps the buffers and the fused tables between them.

    Branches: told all; for guidance of how the band plays, all but that; for guidance by the source,
    nothing. Every buffer is made once and written in place, which lets a CUDA graph repeat the step.
    """

    def __init__(self, parts: StepParts, candidates: int, config: SamplingConfig, frames: int) -> None:
        """frames: the length of every window; must be called without gradients."""
        self.parts, self.config, self.candidates, self.frames = parts, config, candidates, frames
        self._has_untold = config.playing_guidance != 1.0
        self._has_alone = config.guidance != 1.0
        self.branches = 1 + self._has_untold + self._has_alone
        # Prompts do not tell how the band plays, so the first two branches hear the same one. Without a
        # third, all rows are those of one branch.
        self._is_joint = self._has_untold and not self._has_alone
        self._decoder = CachedDecoder(
            parts.backbone,
            shared_positions=parts.shared_positions,
            branches=1 if self._is_joint else self.branches,
            candidates=self.branches * candidates if self._is_joint else candidates,
            prompt_steps=frames,
            target_steps=frames,
        )
        self._source_pad, self._target_pad = len(parts.sources) - 1, len(parts.targets) - 1
        device, hidden_dim = parts.head.device, parts.head.shape[1]
        self._head = parts.head.T.contiguous()

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._place = integers(1)  # the frame that is predicted
        # What stands beside the target's code in each of its steps: the source's code and the sheet.
        self._beside = torch.zeros(self.branches, candidates, frames, hidden_dim, device=device)
        self._codes = integers(frames, candidates)
        self._uniform = torch.zeros(frames, candidates, device=device)
        self._nats = torch.zeros(self.branches, candidates, device=device)
        self._has_prompts = False
        can_repeat = device.type == "cuda" and frames > 1
        self._repeat = _capture(self._take_step, self._place) if can_repeat else None

    def sample(
        self,
        source: Tensor,
        given: Tensor,
        uniform: Tensor,
        progress: Callable[[int], None],
        sheet: Tensor | None = None,
        stop: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue `given` [candidates, k] to frame `stop` of source [frames], k < stop; None: to its end.

        uniform: a number in [0, 1) per code [candidates, frames]. sheet [candidates, frames, COLUMNS]: lead
        sheets that differ in how the band plays.
        Returns codes [candidates, stop] and the log-probabilities of the new ones, summed, in nats
        [branches, candidates].
        """
        known, stop = given.shape[1], self.frames if stop is None else stop
        self._uniform.copy_(uniform.T)
        self._codes[:known] = given.T
        self._nats.zero_()
        rows = source.repeat(self.branches, 1)
        if self._has_alone:
            rows[-1] = self._source_pad
        heard = self.parts.sources[rows]
        aligned = heard[:, None] if self.parts.aligned_source else self.parts.sources[self._source_pad]
        notes = self._read_notes(None if sheet is None else hide_playing(sheet[:1]))[:, 0]
        self._beside.copy_(aligned + self._read_notes(sheet))
        prompts = heard + notes + self.parts.prompt
        # What a window computed serves the next one only where no source is heard: that prompt is the same.
        # The keys of the source and of the codes carried over come from the last window's prompt and stand
        # at other positions, so these are read anew.
        different = [0] if self._is_joint or not self._has_alone else [0, self.branches - 1]
        heard_by = [0] if self._is_joint else [0] * (1 + self._has_untold) + [1] * self._has_alone
        if self._has_alone and self._has_prompts:
            different, heard_by = different[:-1], heard_by[:-1]
        self._decoder.hear(prompts[different], heard_by)
        self._has_prompts = True
        first = given.new_full((self.candidates, 1), self._target_pad)
        past = torch.cat([first, given], dim=1)  # inputs of the steps that predict frames 0..k
        inputs = self._beside[:, :, : known + 1] + self.parts.targets[past]
        self._place.fill_(known)
        self._choose(self._decoder.advance(inputs.flatten(0, 1))[:, -1])
        progress(known + 1)
        for frame in range(known + 1, stop):
            if self._repeat is not None:
                self._repeat()
            else:
                self._take_step(frame + 1)
            progress(frame + 1)
        return self._codes[:stop].T.clone(), self._nats.clone()

    def codes(self, frames: int) -> Tensor:
        """The codes of the window's first frames [candidates, frames], as they are."""
        return self._codes[:frames].T

    def _read_notes(self, sheet: Tensor | None) -> Tensor:
        """What a sheet [rows, frames, COLUMNS] adds [branches, rows, frames, hidden_dim] in each branch."""
        if self.parts.sheet is None:
            return self._beside.new_zeros(1, 1, 1, 1)
        unknown = unknown_sheet(1, self.frames, device=self._beside.device)
        told = unknown if sheet is None else sheet
        branches = [told]
        if self._has_untold:
            branches.append(hide_playing(told))
        if self._has_alone:
            branches.append(unknown.expand_as(told))
        return self.parts.sheet(torch.stack(branches))

    def _take_step(self, reach: int | None = None) -> None:
        """Choose the next frame's codes; reach as in `CachedDecoder.step`."""
        past = self._codes.index_select(0, self._place)[0]
        self._place.add_(1)
        inputs = self._beside.index_select(2, self._place)[:, :, 0] + self.parts.targets.index_select(0, past)
        self._choose(self._decoder.step(inputs.view(-1, 1, inputs.shape[-1]), self._place, reach)[:, 0])

    def _choose(self, hidden: Tensor) -> None:
        """Choose and note the codes of the frame whose states are hidden [rows, hidden_dim]."""
        logits = torch.addmm(self.parts.head_bias, hidden, self._head).log_softmax(dim=-1)
        logits = logits.view(self.branches, self.candidates, -1)
        guided = logits[0]
        if self._has_untold:
            guided = torch.lerp(logits[1], guided, self.config.playing_guidance)
        if self._has_alone:
            guided = guided + (self.config.guidance - 1) * (logits[0] - logits[-1])
        chosen = pick_codes(guided, self._uniform.index_select(0, self._place)[0], self.config)
        self._nats.add_(logits.gather(2, chosen.expand(self.branches, -1)[..., None])[..., 0])
        self._codes.index_copy_(0, self._place, chosen[None])


def _capture(step: Callable[[], None], place: Tensor) -> Callable[[], None]:
    """Record a step as a CUDA graph: some hundred small kernels become one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(place.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up at first use, which must not be recorded
                place.zero_()
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def sample_song(
    parts: StepParts,
    source: Tensor,
    done: Tensor,
    uniform: Tensor,
    config: SamplingConfig,
    sheet: Tensor | None = None,
    again: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    stop: int | None = None,
    follow: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue `done` [candidates, k] to the length of source [frames], k < frames, by window stitching.

    uniform: the numbers that each candidate is drawn by [candidates, frames]. sheet: [candidates, frames,
    COLUMNS]. again [frames]: the earlier frame whose codes a frame takes, -1 where they are sampled. follow:
    see `LanguageModel.compose`. Returns
    codes [candidates, frames], up to frame `stop`, and, of the sampled ones, mean log-probabilities in nats
    with the source and, under guidance, without it [branches, candidates].
    """
    frames, given = len(source), done.shape[1]
    stop = frames if stop is None else stop
    with torch.inference_mode():
        sampler = WindowSampler(parts, len(done), config, min(frames, config.window_frames))
    nats = torch.zeros(sampler.branches, len(done), device=source.device)
    copied = torch.zeros(frames, dtype=torch.bool) if again is None else again.cpu() >= 0
    # Where a run of sampled or of copied frames ends; the last is the end of what is asked for.
    turns = [*(turn for turn in (copied.diff().nonzero()[:, 0] + 1).tolist() if turn < stop), stop]

    def tell_codes(codes: Tensor) -> None:
        if follow is not None:
            with torch.inference_mode(False), torch.no_grad(), threads(before):
                follow(codes.clone().cpu())

    before = torch.get_num_threads()
    with threads(1), torch.inference_mode():
        while done.shape[1] < stop:
            turn = next(turn for turn in turns if turn > done.shape[1])
            if again is not None and copied[done.shape[1]]:
                for frame in again[done.shape[1] : turn].tolist():  # it may be a copy itself
                    done = torch.cat([done, done[:, frame : frame + 1]], dim=1)
                tell_codes(done)
                continue
            start = next_window_start(done.shape[1], frames, config)
            window = slice(start, start + config.window_frames)
            notes = None if sheet is None else sheet[:, window]

            def tell(frames: int, start: int = start, before: Tensor = done) -> None:
                if progress is not None:
                    progress(start + frames)
                if follow is not None and frames % _FOLLOWED_FRAMES == 0:
                    tell_codes(torch.cat([before[:, :start], sampler.codes(frames)], dim=1))

            codes, likely = sampler.sample(
                source[window],
                done[:, start:],
                uniform[:, window],
                tell,
                notes,
                min(turn - start, sampler.frames),
            )
            done, nats = torch.cat([done[:, :start], codes], dim=1), nats + likely
            tell_codes(done)
    return done, nats / max(1, stop - given - int(copied[given:stop].sum()))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads inside of the block.

    A step of a few rows is too small for two. Threads that meet after every operator gain nothing on an idle
    machine, and wait for each other most of the time where another program takes a core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def next_window_start(done_frames: int, frames: int, config: SamplingConfig) -> int:
    """Return where the window begins that continues done_frames of a song of `frames`.

    The last window is moved back to be a whole one, so that its codes have as much past as the others'.
    """
    if done_frames + max(1, config.overlap_frames) <= config.window_frames:
        return 0  # a beginning, or a given prefix that leaves room in the first window
    return max(0, min(done_frames - config.overlap_frames, frames - config.window_frames))
