"""The accompaniment taken apart: drums, bass and the rest, which sum to it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.recipes.separation.separator import Separator

STEMS = ("drums", "bass", "other")


def split_accompaniment(separator: "Separator", accompaniment: "Tensor") -> dict[str, "Tensor"]:
    """Return {"drums", "bass", "other"}, each [2, samples], of a wave [2, samples] at 48 kHz.

    Nobody sings in it: what the separator takes for a voice belongs to "other".
    """
    parts = separator.separate(accompaniment)
    return {**{stem: parts[stem] for stem in STEMS}, "other": parts["other"] + parts["vocal"]}
