"""How two tracks of codes become one sequence of model steps (P B.1, eq. 24).

One step carries one code of each track. Step i of the target segment predicts frame i: its input is the
target's code of frame i - 1 (PAD at the first step).

- unconditional: the target segment alone; both tracks come from frame i - 1 and both are predicted;
- vocal_to_accompaniment: first the whole vocal as a prompt, at positions 0, 1, ... with the accompaniment
  PAD, then the target segment. With `shared_positions` it is at positions 0, 1, ... again, so that frame i
  attends the vocal's frame i at distance zero; without, positions run on, as in the paper. With
  `aligned_source` the step that predicts frame i carries the vocal's code of it too;
- accompaniment_to_vocal: the mirror image.

A step also carries what the lead sheet says of its frame, where there is one; how the band plays stands in
the target's steps only, so that candidates in different styles hear one prompt.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...tokenizer.common.errors import ConfigError
from ..sheet.columns import check_sheet, hide_playing, unknown_sheet

TRACKS = ("vocal", "accompaniment")
# mode -> source track (or none) and predicted tracks
MODES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "unconditional": (None, ("vocal", "accompaniment")),
    "vocal_to_accompaniment": ("vocal", ("accompaniment",)),
    "accompaniment_to_vocal": ("accompaniment", ("vocal",)),
}
SEGMENTS = 4
PROMPT = 0
TARGET_SEGMENT = {"unconditional": 1, "vocal_to_accompaniment": 2, "accompaniment_to_vocal": 3}


class Layout(NamedTuple):
    """Model input, int64; [batch, steps] but for the sheet; the last `frames` are the target segment."""

    vocal: Tensor
    accompaniment: Tensor
    segment: Tensor
    position: Tensor
    sheet: Tensor  # [batch, steps, COLUMNS], see `sheet.columns`
    frames: int

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the number of frames by their names."""
        return dict(zip(self._fields[:-1], self[:-1], strict=True))


def check_mode(mode: str) -> None:
    """Raise ConfigError unless mode is known."""
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; known are {', '.join(MODES)}")


def mode_into(track: str) -> str:
    """Return the mode that predicts `track` from the other one."""
    for mode, (source, targets) in MODES.items():
        if source is not None and targets == (track,):
            return mode
    raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {track!r}")


def shift_right(codes: Tensor, pad: int) -> Tensor:
    """Return codes [batch, frames] delayed by one frame, PAD in front: what is known of each frame."""
    return torch.cat([torch.full_like(codes[:, :1], pad), codes[:, :-1]], dim=1)


def lay_out(
    codes: dict[str, Tensor],
    mode: str,
    *,
    pads: dict[str, int],
    aligned_source: bool,
    shared_positions: bool,
    drop_source: Tensor | None = None,
    history: dict[str, Tensor] | None = None,
    sheet: Tensor | None = None,
) -> Layout:
    """Lay out codes {"vocal", "accompaniment"}, each [batch, frames], for a mode.

    pads: PAD of each track. drop_source [batch] bool: rows whose source is PAD everywhere, as guidance
    needs; nor do they have a sheet. history: other codes to show as the past of the target tracks, for
    example damaged ones. sheet [batch, frames, COLUMNS]: the lead sheet.
    """
    check_mode(mode)
    source, targets = MODES[mode]
    past = {track: shift_right((history or codes)[track], pads[track]) for track in targets}
    batch, frames = past[targets[0]].shape
    device = past[targets[0]].device
    position = torch.arange(frames, device=device).expand(batch, frames)
    segment = torch.full((batch, frames), TARGET_SEGMENT[mode], device=device)
    unknown = unknown_sheet(batch, frames, device=device)
    sheet = unknown if sheet is None else check_sheet(sheet, frames).to(device)
    if source is None:
        return Layout(past["vocal"], past["accompaniment"], segment, position, sheet, frames)
    given = codes[source]
    if given.shape != (batch, frames):
        raise ConfigError(f"the source is {tuple(given.shape)}, the target {(batch, frames)}; cut them alike")
    silent = torch.full_like(given, pads[source])
    if drop_source is not None:
        given = torch.where(drop_source[:, None], silent, given)
        sheet = torch.where(drop_source[:, None, None], unknown, sheet)
    (target,) = targets
    absent = torch.full_like(past[target], pads[target])
    rows = {
        source: torch.cat([given, given if aligned_source else silent], dim=1),
        target: torch.cat([absent, past[target]], dim=1),
    }
    return Layout(
        vocal=rows["vocal"],
        accompaniment=rows["accompaniment"],
        segment=torch.cat([torch.full_like(segment, PROMPT), segment], dim=1),
        position=torch.cat([position, position if shared_positions else position + frames], dim=1),
        sheet=torch.cat([hide_playing(sheet), sheet], dim=1),
        frames=frames,
    )
