"""The lead sheet: the place in the bar and the chord of every frame, as a band would have them on paper.

The language model may be shown one beside the vocal. Both are read out of the vocal by `SheetReader`, or
given by whoever knows better; a frame of which one is not known is UNKNOWN there.
"""

import torch
from torch import Tensor, nn

from ..tokenizer.common.errors import DataError

PLACES = 16  # parts of a bar
CHORDS = 25  # twelve major, twelve minor, no chord
NO_CHORD = 24
UNKNOWN = -1
PLACE, CHORD = 0, 1  # columns of a sheet [..., 2] int64


def unknown_sheet(*shape: int, device: torch.device | None = None) -> Tensor:
    """Return a sheet [*shape, 2] of which nothing is known."""
    return torch.full((*shape, 2), UNKNOWN, device=device)


def check_sheet(sheet: Tensor, frames: int) -> Tensor:
    """Return a sheet [..., frames, 2] as it is; raise DataError unless it is one of so many frames."""
    if sheet.ndim < 2 or sheet.shape[-2:] != (frames, 2):
        raise DataError(f"the lead sheet is {tuple(sheet.shape)}, not [..., {frames}, 2]; cut it alike")
    for column, size, name in ((PLACE, PLACES, "places in the bar"), (CHORD, CHORDS, "chords")):
        values = sheet[..., column]
        if values.numel() and (int(values.min()) < UNKNOWN or int(values.max()) >= size):
            raise DataError(f"{name} of a lead sheet must be in {UNKNOWN}..{size - 1}")
    return sheet


_GAIN = 8.0  # the codes' part of an input is as large; without it the sheet takes long to be noticed


class LeadSheetEmbedding(nn.Module):
    """What a sheet adds to the input of each step; nothing at first, so that a trained model may learn it."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.places = nn.Embedding(PLACES + 1, hidden_dim)  # the first entry: unknown
        self.chords = nn.Embedding(CHORDS + 1, hidden_dim)
        for table in (self.places, self.chords):
            nn.init.zeros_(table.weight)

    def forward(self, sheet: Tensor) -> Tensor:
        """Sheet [..., 2] -> [..., hidden_dim]."""
        return _GAIN * (self.places(sheet[..., PLACE] + 1) + self.chords(sheet[..., CHORD] + 1))
