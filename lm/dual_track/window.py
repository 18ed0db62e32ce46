"""Sample the codes of one window: prompts, given codes, then frame by frame, all of it on the device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..sheet.columns import unknown_sheet
from .choice import SamplingConfig, pick_codes
from .decoding import CachedDecoder
from .layout import MODES, PROMPT, TARGET_SEGMENT, TRACKS
from .model import DualTrackLM


class WindowSampler:
    """Samples windows of one length; keeps the buffers and the fused tables between them.

    Branches: with the source and, for guidance, without it. Every buffer is made once and written in place,
    which is what lets a CUDA graph repeat the step.
    """

    def __init__(
        self, lm: DualTrackLM, mode: str, candidates: int, config: SamplingConfig, frames: int
    ) -> None:
        """frames: the length of every window; must be called without gradients."""
        self.lm, self.config, self.candidates, self.frames = lm, config, candidates, frames
        source, (target,) = MODES[mode]
        assert source is not None
        self.branches = 2 if config.guidance != 1.0 else 1
        self._decoder = CachedDecoder(
            lm, branches=self.branches, candidates=candidates, prompt_steps=frames, target_steps=frames
        )
        self._source_pad, self._target_pad = lm.pads[source], lm.pads[target]
        self._sources, targets = _input_table(lm, source), _input_table(lm, target)
        segments = lm.segments.weight + lm.project.bias
        self._prompt_input = targets[self._target_pad] + segments[PROMPT]
        self._targets = targets + segments[TARGET_SEGMENT[mode]]
        head = lm.codes_of(target)
        self._head = head.vectors @ head.anchor_out.weight + head.residual_out.weight  # [codes, hidden_dim]
        self._head_bias = head.residual_out.bias

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=lm.device)

        self._place = integers(1)  # the frame that is predicted
        # What stands beside the target's code in each of its steps: the source's code and the sheet.
        self._beside = torch.zeros(self.branches, frames, lm.config.hidden_dim, device=lm.device)
        self._codes = integers(frames, candidates)
        self._uniform = torch.zeros(frames, candidates, device=lm.device)
        self._nats = torch.zeros(self.branches, candidates, device=lm.device)
        self._has_prompts = False
        can_repeat = lm.device.type == "cuda" and frames > 1
        self._repeat = _capture(self._take_step, self._place) if can_repeat else None

    def sample(
        self,
        source: Tensor,
        given: Tensor,
        uniform: Tensor,
        progress: Callable[[int], None] | None,
        sheet: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue `given` [candidates, k] to the length of source [frames], k < frames.

        uniform: a number in [0, 1) per code [candidates, frames]. sheet [frames, COLUMNS]: the lead sheet.
        Returns codes [candidates, frames] and the log-probabilities of the new ones, summed, in nats
        [branches, candidates].
        """
        known = given.shape[1]
        self._uniform.copy_(uniform.T)
        self._codes[:known] = given.T
        self._nats.zero_()
        rows = torch.full((self.branches, self.frames), self._source_pad, device=source.device)
        rows[0] = source
        heard, notes = self._sources[rows], self._read_notes(sheet)
        aligned = heard if self.lm.config.aligned_source else self._sources[self._source_pad]
        self._beside.copy_(aligned + notes)
        # What a window computed serves the next one only where no source is heard: that prompt is the same.
        # The keys of the source and of the codes carried over come from the last window's prompt and stand
        # at other positions, so these are read anew.
        count = 1 if self._has_prompts else self.branches
        self._decoder.hear((heard + notes)[:count] + self._prompt_input)
        self._has_prompts = True
        first = given.new_full((self.candidates, 1), self._target_pad)
        past = torch.cat([first, given], dim=1)  # inputs of the steps that predict frames 0..k
        inputs = self._beside[:, None, : known + 1] + self._targets[past]
        self._place.fill_(known)
        self._choose(self._decoder.advance(inputs.flatten(0, 1))[:, -1])
        _tell(progress, known + 1)
        for frame in range(known + 1, self.frames):
            if self._repeat is not None:
                self._repeat()
            else:
                self._take_step(frame + 1)
            _tell(progress, frame + 1)
        return self._codes.T.clone(), self._nats.clone()

    def _read_notes(self, sheet: Tensor | None) -> Tensor:
        """What a sheet [frames, COLUMNS] adds [branches, frames, hidden_dim]; nothing without the source."""
        sheets = unknown_sheet(self.branches, self.frames, device=self._beside.device)
        if sheet is not None:
            sheets[0] = sheet
        return torch.zeros_like(self._beside) if self.lm.sheet is None else self.lm.sheet(sheets)

    def _take_step(self, reach: int | None = None) -> None:
        """Choose the next frame's codes; reach as in `CachedDecoder.step`."""
        past = self._codes.index_select(0, self._place)[0]
        self._place.add_(1)
        inputs = self._beside.index_select(1, self._place) + self._targets[past]
        self._choose(self._decoder.step(inputs.view(-1, 1, inputs.shape[-1]), self._place, reach)[:, 0])

    def _choose(self, hidden: Tensor) -> None:
        """Choose and note the codes of the frame whose states are hidden [rows, hidden_dim]."""
        logits = functional.linear(hidden, self._head, self._head_bias)
        logits = logits.view(self.branches, self.candidates, -1)
        guided = logits[0]
        if self.branches > 1:
            guided = torch.lerp(logits[1], logits[0], self.config.guidance)
        chosen = pick_codes(guided, self._uniform.index_select(0, self._place)[0], self.config)
        picked = logits.gather(2, chosen.expand(self.branches, -1)[..., None])[..., 0]
        self._nats.add_(picked - logits.logsumexp(dim=-1))
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


def _input_table(lm: DualTrackLM, track: str) -> Tensor:
    """Return [codes + 1, hidden_dim]: what each code of the track adds to a step's input (eq. 24)."""
    codes = lm.codes_of(track)
    width = lm.config.embedding_dim
    first = TRACKS.index(track) * width
    everything = torch.arange(codes.codes + 1, device=lm.device)
    return functional.linear(codes.embed(everything), lm.project.weight[:, first : first + width])


def _tell(progress: Callable[[int], None] | None, frames: int) -> None:
    if progress is not None:
        progress(frames)
