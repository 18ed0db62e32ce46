"""The accompaniment taken apart: drums, bass and the rest, which sum to it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.errors import DuoTokError

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


class StemWriter:
    """Writes accompaniment-<stem><suffix>.wav; a separator that fails costs the stems and nothing else."""

    def __init__(self, folder: Path, open_separator: Callable[[], "Separator"]) -> None:
        self._folder, self._open = folder, open_separator
        self._separator: Separator | None = None
        self.failure: str | None = None

    def write(self, accompaniment: "Tensor", suffix: str = "") -> dict[str, str]:
        """Return {stem: file name} of what was written; empty after a failure."""
        from duotok.tokenizer.common.audio import write_audio

        if self.failure is not None:
            return {}
        try:
            self._separator = self._separator or self._open()
            waves = split_accompaniment(self._separator, accompaniment)
        except DuoTokError as error:
            self.failure = f"no stems: {error}"
            return {}
        names = {stem: f"accompaniment-{stem}{suffix}.wav" for stem in STEMS}
        for stem, wave in waves.items():
            # Floats: the sum stays exact, and a stem may exceed full scale where two of them cancel.
            write_audio(self._folder / names[stem], wave, subtype="FLOAT")
        return names
