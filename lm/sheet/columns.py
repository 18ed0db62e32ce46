"""The lead sheet: the place in the bar and the chord of every frame, as a band would have them on paper.

The language model may be shown one beside the vocal. Both are read out of the vocal by `SheetReader`, or
given by whoever knows better; a frame of which one is not known is UNKNOWN there. With each stands how far it
can be trusted, as a level. Further columns say how the band is to play, see `playing`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...tokenizer.common.errors import DataError
from ...tokenizer.music.labels import CHORDS

PLACES = 16  # parts of a bar
METERS = (2, 3, 4, 6)  # beats of a bar; a sheet's METER is the place in here
BEATS_PER_BAR = 4  # as a rule, and where it is not known
UNKNOWN = -1
WRITTEN = 8  # the highest level of trust: known, not read
# Columns of a sheet [..., COLUMNS] int64; those from METER on tell the band how to play.
PLACE, CHORD, PLACE_TRUST, CHORD_TRUST, METER, TEMPO, STYLE, DRUMS, BASS, HARMONY = range(10)
COLUMNS = 10
PLAYING = slice(METER, COLUMNS)
CHART = (CHORD, STYLE, DRUMS, BASS, HARMONY)  # what a renderer may be told of it
TRUST = {PLACE: PLACE_TRUST, CHORD: CHORD_TRUST}


def unknown_sheet(*shape: int, device: torch.device | None = None) -> Tensor:
    """Return a sheet [*shape, COLUMNS] of which nothing is known."""
    return torch.full((*shape, COLUMNS), UNKNOWN, device=device)


def write_sheet(places: np.ndarray, chords: np.ndarray) -> Tensor:
    """Return the sheet [frames, COLUMNS] of places and chords [frames] that are known, where not UNKNOWN."""
    sheet = unknown_sheet(len(places))
    sheet[:, PLACE], sheet[:, CHORD] = torch.from_numpy(places), torch.from_numpy(chords)
    return commit(sheet)


def check_sheet(sheet: Tensor, frames: int, playing: Sequence[int] = ()) -> Tensor:
    """Return a sheet [..., frames, COLUMNS] as it is; raise DataError unless it is one of so many frames.

    playing: number of values of each column from METER on, checked where given.
    """
    if sheet.ndim < 2 or sheet.shape[-2:] != (frames, COLUMNS):
        raise DataError(
            f"the lead sheet is {tuple(sheet.shape)}, not [..., {frames}, {COLUMNS}]; cut it alike"
        )
    for column, size, name in (
        (PLACE, PLACES, "places in the bar"),
        (CHORD, CHORDS, "chords"),
        (PLACE_TRUST, WRITTEN + 1, "trust in the places"),
        (CHORD_TRUST, WRITTEN + 1, "trust in the chords"),
        *((column, size, "what the band is told") for column, size in enumerate(playing, start=METER)),
    ):
        values = sheet[..., column]
        if values.numel() and (int(values.min()) < UNKNOWN or int(values.max()) >= size):
            raise DataError(f"{name} of a lead sheet must be in {UNKNOWN}..{size - 1}")
    return sheet


def hide_playing(sheet: Tensor) -> Tensor:
    """Return a sheet [..., COLUMNS] that says nothing of how the band plays."""
    sheet = sheet.clone()
    sheet[..., PLAYING] = UNKNOWN
    return sheet


def commit(sheet: Tensor) -> Tensor:
    """Return a sheet [..., COLUMNS] that is believed as if all that is known of it were written.

    For playing: a band in doubt between its sheet and the singer keeps neither's time, one that follows a
    wrong sheet at least stays together.
    """
    sheet = sheet.clone()
    for column, trust in TRUST.items():
        sheet[..., trust] = torch.where(sheet[..., column] == UNKNOWN, UNKNOWN, WRITTEN)
    return sheet


_GAIN = 8.0  # the codes' part of an input is as large; without it the sheet takes long to be noticed


def _common_places(beats: int) -> Tensor:
    """Return which place of a bar of BEATS_PER_BAR each place of another bar is like [PLACES].

    Beats are like those of the same number, and what is more in a long bar like its last ones.
    """
    turns = (torch.arange(PLACES) + 0.5) * beats / PLACES  # beats since the bar line
    turns = torch.where(turns < BEATS_PER_BAR, turns, turns - beats + BEATS_PER_BAR)
    return (turns * PLACES / BEATS_PER_BAR).long()


class LeadSheetEmbedding(nn.Module):
    """What a sheet adds to the input of each step; nothing at first, so that a trained model may learn it.

    A third of the way through a bar of three is a beat, in a bar of four it is none: a model that is told the
    meter has a table of places for each.
    """

    def __init__(self, hidden_dim: int, playing: Sequence[int] = ()) -> None:
        """playing: number of values of each column from METER on; empty for a model that is not told them."""
        super().__init__()
        # The first entry of each table: unknown. The first table of places: of no known meter.
        self.meters = playing[0] if playing else 0
        self.places = nn.Embedding((1 + self.meters) * (PLACES + 1), hidden_dim)
        self.chords = nn.Embedding(CHORDS + 1, hidden_dim)
        # How much of it is heard at each level; a level by itself says nothing.
        self.place_trust = nn.Embedding(WRITTEN + 2, 1)
        self.chord_trust = nn.Embedding(WRITTEN + 2, 1)
        told = [nn.Embedding(size + 1, hidden_dim) for size in playing]
        self.playing = nn.ModuleList(told)
        for table in (self.places, self.chords, *told):
            nn.init.zeros_(table.weight)
        for table in (self.place_trust, self.chord_trust):
            with torch.no_grad():
                table.weight[:, 0] = torch.cat([torch.ones(1), torch.linspace(0.3, 1.0, WRITTEN + 1)])

    @torch.no_grad()
    def learn_from(self, known: "LeadSheetEmbedding", styles: Sequence[int] = ()) -> None:
        """Take over what another has learned. styles: where each style that it knows stands here.

        Of one that is told no meter, places keep their part of the beat in each.
        """
        tables = known.state_dict()
        style = f"playing.{STYLE - METER}.weight"
        if style in tables:
            rows = torch.tensor([0, *(place + 1 for place in styles)])
            tables[style] = self.state_dict()[style].index_copy(0, rows, tables[style])
        if self.meters and not known.meters:
            rows = [torch.cat([torch.zeros(1).long(), 1 + _common_places(beats)]) for beats in METERS]
            tables["places.weight"] = tables["places.weight"][torch.cat([torch.arange(PLACES + 1), *rows])]
        self.load_state_dict(tables, strict=False)

    def forward(self, sheet: Tensor) -> Tensor:
        """Sheet [..., COLUMNS] -> [..., hidden_dim]."""
        place, chord, place_trust, chord_trust, *playing = (sheet + 1).unbind(dim=-1)
        if self.meters:
            place = place + (PLACES + 1) * playing[0]
        total = self.place_trust(place_trust) * self.places(place)
        total = total + self.chord_trust(chord_trust) * self.chords(chord)
        for table, column in zip(self.playing, playing, strict=False):
            total = total + table(column)
        return _GAIN * total
