"""What a band is told beside chords and bars: meter, tempo, style, and how much each stem plays."""

from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ...tokenizer.common.errors import ConfigError
from .columns import BASS, DRUMS, HARMONY, METERS

TEMPO_EDGES_BPM = (60.0, 72.0, 84.0, 96.0, 108.0, 124.0, 144.0)  # between the tempo classes
# What a stem does in a bar: nothing; one stroke or chord at its beginning, which rings; less or more of the
# usual number of onsets.
OUT, HELD, LIGHT, FULL = range(4)
LEVELS = ("out", "held", "light", "full")
STEM_COLUMNS = {"drums": DRUMS, "bass": BASS, "chords": HARMONY}


def tempo_class(beats_per_minute: float) -> int:
    """Return the class of a tempo, counted in the beats of the bar."""
    return bisect(TEMPO_EDGES_BPM, beats_per_minute)


@dataclass(frozen=True, kw_only=True)
class BandConfig:
    """The styles that a model has learned, and how often it heard each in which meter and tempo."""

    # style, beats of a bar, class of the tempo, number of items
    heard: tuple[tuple[str, int, int, int], ...]

    def __post_init__(self) -> None:
        if not self.heard:
            raise ConfigError("a band needs at least one style that it has heard")
        for style, beats, tempo, count in self.heard:
            if beats not in METERS or not 0 <= tempo <= len(TEMPO_EDGES_BPM) or count < 1:
                raise ConfigError(
                    f"style {style!r} was heard in an impossible way: {beats}, {tempo}, {count}"
                )

    @classmethod
    def count(cls, items: Iterable[tuple[str, int, float]]) -> "BandConfig":
        """Count (style, beats of a bar, tempo in BPM) of the items that are learned from."""
        counts = Counter((style, beats, tempo_class(tempo)) for style, beats, tempo in items)
        return cls(heard=tuple((*which, number) for which, number in sorted(counts.items())))

    def join(self, other: "BandConfig") -> "BandConfig":
        """Return a band that has heard what both have; what both heard counts as `other` says."""
        heard = {each[:3]: each for each in (*self.heard, *other.heard)}
        return BandConfig(heard=tuple(sorted(heard.values())))

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the styles; a sheet's STYLE is the place in here."""
        return tuple(sorted({style for style, *_ in self.heard}))

    def column_sizes(self) -> tuple[int, ...]:
        """Return how many values each column of a sheet from METER on has."""
        levels = (len(LEVELS),) * len(STEM_COLUMNS)
        return (len(METERS), len(TEMPO_EDGES_BPM) + 1, len(self.styles), *levels)

    def meters(self) -> tuple[int, ...]:
        """Return the meters that were heard, in beats of a bar."""
        return tuple(sorted({beats for _, beats, *_ in self.heard}))

    def draw(
        self, number: int, *, beats: int, beats_per_minute: float, rng: np.random.Generator
    ) -> list[str]:
        """Draw styles as they were heard in a meter and about a tempo, none twice before all have come."""
        tempo = tempo_class(beats_per_minute)
        weights = dict.fromkeys(self.styles, 0.0)
        for style, meter, other, count in self.heard:
            if meter == beats:
                weights[style] += count * 0.25 ** abs(other - tempo)
        usable = {style: weight for style, weight in weights.items() if weight > 0}
        usable = usable or dict.fromkeys(weights, 1.0)
        shares = np.array(list(usable.values())) / sum(usable.values())
        drawn: list[str] = []
        while len(drawn) < number:
            drawn += rng.choice(list(usable), size=len(usable), replace=False, p=shares).tolist()
        return drawn[:number]
