"""What is asked of the band: a request checks itself, and everything it names, before a model is loaded.

Kept apart from the pipeline so that a command line can show settings without loading torch.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.accompany.output import EXPORTED, FORMATS
from duotok.tokenizer.common.config import config_from_dict
from duotok.tokenizer.common.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.recipes.accompany.mix import Vocal
    from duotok.recipes.accompany.original import Original
    from duotok.recipes.accompany.wishes import Chart, SheetWishes

DEVICES = ("auto", "cpu", "cuda", "mps")
OWN_SEPARATOR = "mask-head"  # part of the model, so that nothing else must be installed
METER_NAMES = {2: "2/4", 3: "3/4", 4: "4/4", 6: "6/8"}  # beats of a bar -> how it is written
INSTALLED = "installed"  # sound font of which only that it is there is known
STEMS = ("drums", "bass", "chords")  # that a band may do without
# Lowest and highest value of every number; whole numbers where the limits are.
_LIMITS: dict[str, tuple[float, float]] = {
    "guidance": (0.0, 100.0),
    "playing_guidance": (0.0, 100.0),
    "temperature": (0.0, 10.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.001, 1.0),
    "candidates": (1, 99),
    "steps": (1, 1000),
    "render_guidance": (0.0, 100.0),
    "accompaniment_db": (-60.0, 30.0),
    "tuning": (-100.0, 100.0),
    "seed": (0, 2**63 - 1),
    "variations": (1, 99),
    "intro": (0, 16),
}
# Options of `generate` that are not called as the field they set.
_OPTIONS = {
    "guidance": "--cfg",
    "playing_guidance": "--style-cfg",
    "accompaniment_db": "--level",
    "tuning": "--tuning",
}
# What a repaint takes from its original, and how the option is called.
_SETTLED = {
    "prefix": "--prefix",
    "intro": "--intro",
    "tempo_bpm": "--tempo",
    "downbeat_seconds": "--downbeat",
    "key": "--key",
    "meter": "--meter",
    "accompaniment_db": "--level",
    "play": "--play",
}
_SHORTEST_STRETCH_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What can be changed between two accompaniments of the same vocal; a bundle may bring other defaults."""

    guidance: float = 1.5  # classifier-free guidance of the language model; 1 = none
    playing_guidance: float = 1.0  # the same of style and levels, for models that are told them
    temperature: float = 0.95  # 0 takes the most likely code
    top_k: int = 100  # most likely codes to draw from; 0 = all
    top_p: float = 0.95  # smallest set of codes with this probability; 1 = all
    candidates: int = 1  # how many are composed, of which the best by ranking are kept
    steps: int = 4  # solver steps of the diffusion decoder
    render_guidance: float = 2.0  # classifier-free guidance of the diffusion decoder; 1 = none
    accompaniment_db: float = -1.0  # loudness of the accompaniment over the vocal's (LUFS)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check_number(name, value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One wish for accompaniments; ConfigError names the field of a value that cannot be.

    Either `vocal` or `mix` is given: a file of any rate and channel count, or a wave [channels, samples] at
    48 kHz. Settings that are None come from the bundle; see GenerationSettings.
    """

    # The singer alone, or several takes that are heard as one.
    vocal: "str | Path | Tensor | Vocal | Sequence[str | Path | Tensor] | None" = None
    mix: "str | Path | Tensor | Vocal | None" = None  # a whole song, of which the vocal is separated first
    separator: str = OWN_SEPARATOR  # takes the vocal out of the mix, and the accompaniment apart into stems
    separator_checkpoint: str | Path | None = None  # its weights; None: the bundle's, or those it brings
    # Of what is written, one of FORMATS; stems are always floats. None: wav, or that of the original.
    format: str | None = None
    stems: bool = False  # whether drums, bass and the rest of the accompaniment are wanted as well
    export: tuple[str, ...] = ()  # which of EXPORTED are written beside the sound
    play: str | Path | None = None  # font that plays the band's score as well; INSTALLED: one that is there
    prefix: "str | Path | Tensor | None" = None  # a given start of the accompaniment, shorter than the song
    tempo_bpm: float | None = None  # None: as it is sung
    downbeat_seconds: float | None = None  # where a bar begins; None: where it seems to
    key: str | None = None  # of the whole song, such as "Eb:maj" or "Am"; None: as it is sung
    chords: "str | Path | Chart | None" = None  # a chart to play; None, and where it is silent: what fits
    tuning: str | float = "auto"  # cents of the singer over A = 440 Hz; "off": as if there were none
    style: str | None = None  # one that the model knows; None: one of those usual at the tempo is drawn
    without: tuple[str, ...] = ()  # which of STEMS do not play
    meter: str | None = None  # 2/4, 3/4, 4/4 or 6/8; None: the usual one of the style, or 4/4
    intro: int | None = None  # bars before the singer's first that the band begins; None: with the recording
    # A stretch that is composed anew, in seconds of mix.wav, or "32.0-48.0", and the folder of that result;
    # chords, style and without are then those of the stretch, all else is as it was.
    repaint: tuple[float, float] | str | None = None
    original: "str | Path | Original | None" = None
    seed: int | None = None  # of the first candidate; the others have the numbers after it. None: 0, or drawn
    variations: int = 1  # how many accompaniments are wanted, best first
    keep: int | None = None  # how many of the variations are rendered; None: all
    guidance: float | None = None
    playing_guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    candidates: int | None = None
    steps: int | None = None
    render_guidance: float | None = None
    accompaniment_db: float | None = None

    def __post_init__(self) -> None:
        if (self.vocal is None) == (self.mix is None):
            raise ConfigError("give either a vocal or a mix, and not both")
        if isinstance(self.vocal, (list, tuple)) and not self.vocal:
            raise ConfigError("vocal must name one take at least, got none")
        self._check_repaint()
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.tuning not in ("auto", "off"):
            object.__setattr__(self, "tuning", _read_cents(self.tuning))
        for name in ("seed", "variations", "intro"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        if self.meter not in (None, *METER_NAMES.values()):
            *names, last = METER_NAMES.values()
            raise ConfigError(f"meter must be {', '.join(names)} or {last}, got {self.meter!r}")
        for stem in self.without:
            if stem not in STEMS:
                raise ConfigError(f"without must name any of {', '.join(STEMS)}, got {stem!r}")
        if set(self.without) == set(STEMS):
            raise ConfigError(f"without {', '.join(STEMS)} nobody plays; leave one of them")
        if self.prefix is not None and self.intro is not None:
            raise ConfigError("give either a prefix or an intro: both are how the accompaniment begins")
        if self.keep is not None and (type(self.keep) is not int or not 1 <= self.keep <= self.variations):
            raise ConfigError(f"keep must be from 1 to variations ({self.variations}), got {self.keep!r}")
        self.settings({})
        for kind in self.export:
            if kind not in EXPORTED:
                raise ConfigError(f"export must name any of {', '.join(EXPORTED)}, got {kind!r}")
            for package in EXPORTED[kind].packages:
                if find_spec(package) is None:
                    raise ConfigError(
                        f"{package}, which writes {kind}, is missing; in the checkout: pip install '.[score]'"
                    )
        if self.play not in (None, INSTALLED):
            from duotok.renderer.sound_font import find_sound_font

            find_sound_font(self.play)
        if self.separator != OWN_SEPARATOR:
            from duotok.recipes.separation.adapters import require_separator

            require_separator(self.separator)
        known = (self.tempo_bpm, self.downbeat_seconds, self.key)
        if any(value is not None for value in known) or isinstance(self.chords, list):
            self.wishes()

    def _check_repaint(self) -> None:
        """Bring the stretch into form; ConfigError where it, or what is wished for it, cannot be."""
        if (self.repaint is None) != (self.original is None):
            raise ConfigError("give both the stretch to repaint (--repaint) and the original of it (--from)")
        if self.repaint is None:
            return
        stretch: Any = self.repaint
        try:
            start, end = map(float, stretch.split("-") if isinstance(stretch, str) else stretch)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"repaint must be START-END in seconds, as 32.0-48.0, got {stretch!r}"
            ) from error
        if not 0 <= start < end < float("inf"):
            raise ConfigError(f"repaint must begin at 0 s or later and end after that, got {start:g}-{end:g}")
        if end - start < _SHORTEST_STRETCH_SECONDS:
            raise ConfigError(
                f"repaint must be {_SHORTEST_STRETCH_SECONDS:g} s or longer, got {start:g}-{end:g}"
            )
        object.__setattr__(self, "repaint", (start, end))
        asked = [option for name, option in _SETTLED.items() if getattr(self, name) is not None]
        asked += ["--tuning"] if self.tuning != "auto" else []
        if asked:
            raise ConfigError(f"a repaint keeps what its original settled; leave out {', '.join(asked)}")

    @property
    def files(self) -> "list[str | Path]":
        """The files that are named, until they are read; the recording of the singer first."""
        takes = self.vocal if isinstance(self.vocal, (list, tuple)) else [self.vocal]
        named = (*takes, self.mix, self.prefix, self.chords)
        return [source for source in named if isinstance(source, (str, Path))]

    @property
    def song(self) -> "Vocal":
        """The recording that is accompanied, or the mix with it in; of a request that has been read."""
        from duotok.recipes.accompany.mix import Vocal

        song = self.vocal if self.mix is None else self.mix
        assert isinstance(song, Vocal)
        return song

    @property
    def beats_per_bar(self) -> int | None:
        """The beats of the meter that is asked for."""
        return next((beats for beats, name in METER_NAMES.items() if name == self.meter), None)

    @property
    def renderings(self) -> int:
        """How many accompaniments are rendered."""
        return self.variations if self.keep is None else self.keep

    def settings(self, bundle_defaults: Mapping[str, Any]) -> GenerationSettings:
        """The settings of this request; the bundle's own where they are None."""
        chosen = {field.name: getattr(self, field.name) for field in fields(GenerationSettings)}
        return resolve_settings(bundle_defaults, chosen)

    def wishes(self) -> "SheetWishes":
        """What is known of the song beforehand; `chords` has been read."""
        from duotok.recipes.accompany.wishes import SheetWishes

        chart = None if isinstance(self.chords, (str, Path)) else self.chords
        return SheetWishes(
            tempo_bpm=self.tempo_bpm,
            downbeat_seconds=self.downbeat_seconds,
            key=self.key,
            chart=chart,
            beats_per_bar=self.beats_per_bar,
        )

    def read(self) -> "Request":
        """The same request with its files read and checked: recordings as waves, chords as a chart.

        What is no file name stays, so reading twice is as good as once. Raises AudioError and DataError.
        """
        from duotok.recipes.accompany.mix import Vocal, load_prefix, load_vocal
        from duotok.recipes.accompany.wishes import read_chart
        from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

        chart = read_chart(self.chords) if isinstance(self.chords, (str, Path)) else self.chords
        name, what, source = ("vocal", "vocal", self.vocal) if self.mix is None else ("mix", "song", self.mix)
        assert source is not None
        song = source if isinstance(source, Vocal) else load_vocal(source, what=what)
        told: list[str] = []
        prefix = None if self.prefix is None else load_prefix(self.prefix, song, told.append)[0]
        song = replace(song, warnings=(*song.warnings, *told))
        if self.original is not None:
            return self._read_original(song, **{name: song}, chords=chart)
        seconds = song.wave.shape[-1] / SAMPLE_RATE_HZ
        if self.downbeat_seconds is not None and self.downbeat_seconds >= seconds:
            raise ConfigError(f"the downbeat ({self.downbeat_seconds:g} s) is past the end ({seconds:.1f} s)")
        return replace(self, **{name: song}, chords=chart, prefix=prefix)

    def _read_original(self, song: "Vocal", **read: Any) -> "Request":
        """The request with what was read and its original, which was made of this song; a seed is drawn."""
        from duotok.recipes.accompany.original import Original, find_original

        given = self.original
        original = given if isinstance(given, Original) else find_original(str(given)).read()
        assert isinstance(self.repaint, tuple)
        original.require_recording(song.wave)
        original.require_wish(self.repaint, self.format, model=None)
        seed = self.seed
        while seed is None or (self.seed is None and seed == original.report.get("seed")):
            seed = secrets.randbelow(2**31)
        return replace(self, **read, original=original, format=original.format, seed=seed)


def resolve_settings(
    bundle_defaults: Mapping[str, Any], chosen: Mapping[str, Any], where: str = "settings"
) -> GenerationSettings:
    """The chosen settings over the bundle's defaults over the general ones; None counts as not chosen."""
    values = {**bundle_defaults, **{name: value for name, value in chosen.items() if value is not None}}
    return config_from_dict(GenerationSettings, values, where)


def parse_defaults(texts: Sequence[str]) -> dict[str, Any]:
    """Checked settings from "guidance=2.0" texts."""
    general = asdict(GenerationSettings())
    values: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in general:
            raise ConfigError(f"--default {text!r} must be KEY=VALUE with KEY one of {', '.join(general)}")
        try:
            values[name] = type(general[name])(value)
        except ValueError as error:
            raise ConfigError(f"--default {text!r}: {value!r} is not a number") from error
    resolve_settings({}, values)
    return values


def _read_cents(tuning: str | float) -> float:
    """A tuning in cents, which may be a text; ConfigError if it is none."""
    try:
        value = float(tuning) if isinstance(tuning, str) else tuning
    except ValueError as error:
        raise ConfigError(f"tuning (--tuning) must be auto, off or cents, got {tuning!r}") from error
    _check_number("tuning", value)
    return value


def _check_number(name: str, value: Any) -> None:
    low, high = _LIMITS[name]
    whole = isinstance(low, int)
    label = f"{name} ({_OPTIONS[name]})" if name in _OPTIONS else name
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{label} must be a {'whole ' if whole else ''}number, got {value!r}")
    if not low <= value <= high:  # also refuses NaN
        span = f"{low} to {high}" if whole else f"{low:g} to {high:g}"
        raise ConfigError(f"{label} must be from {span}, got {value}")
