"""The chart: what a decoder may be told of the music beside its features, for every frame of 40 ms.

Codes at 25 Hz leave open which notes of a chord sound and which instruments play them. The chord, the style
and how much drums, bass and chords play are known where a band plays from a lead sheet; what is not known is
UNKNOWN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..tokenizer.common.errors import DataError
from ..tokenizer.music.labels import CHORDS

UNKNOWN = -1
COLUMNS = 5  # of a chart [..., COLUMNS] int64: chord, style, levels of drums, bass and chords
STYLE = 1
LEVELS = 4  # out, held, light, full
_GAIN = 8.0  # without it a chart takes long to be noticed beside the features


def column_sizes(styles: int) -> tuple[int, ...]:
    """Return how many values each column has for a decoder that knows so many styles."""
    return (CHORDS, styles, LEVELS, LEVELS, LEVELS)


def check_chart(chart: Tensor, frames: int, styles: int) -> Tensor:
    """Return a chart [..., frames, COLUMNS] as it is; raise DataError unless it is one of so many frames."""
    if chart.ndim < 2 or chart.shape[-2:] != (frames, COLUMNS):
        raise DataError(f"the chart is {tuple(chart.shape)}, not [..., {frames}, {COLUMNS}]; cut it alike")
    for column, size in enumerate(column_sizes(styles)):
        values = chart[..., column]
        if values.numel() and (int(values.min()) < UNKNOWN or int(values.max()) >= size):
            raise DataError(f"column {column} of a chart must be in {UNKNOWN}..{size - 1}")
    return chart


class ChartEmbedding(nn.Module):
    """What a chart adds to the features; nothing at first, so that a trained decoder may learn it."""

    def __init__(self, dim: int, styles: Sequence[str]) -> None:
        super().__init__()
        # The first entry of each table: unknown.
        tables = [nn.Embedding(size + 1, dim) for size in column_sizes(len(styles))]
        for table in tables:
            nn.init.zeros_(table.weight)
        self.tables = nn.ModuleList(tables)

    def forward(self, chart: Tensor) -> Tensor:
        """chart [..., COLUMNS] -> [..., dim]."""
        columns = (chart + 1).unbind(dim=-1)
        parts = [table(column) for table, column in zip(self.tables, columns, strict=True)]
        return _GAIN * torch.stack(parts).sum(dim=0)
