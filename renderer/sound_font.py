"""Notes to sound by an instrument that a user has: SF2 and SF3 by tinysoundfont, SFZ by pysfizz."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..tokenizer.common.audio import SAMPLE_RATE_HZ
from ..tokenizer.common.errors import DataError

SOUND_FONT_FOLDERS = ("/usr/share/sounds/sf3", "/usr/share/sounds/sf2", "/usr/local/share/sounds")
PREFERRED = ("MuseScore_General", "FluidR3", "default-GM", "TimGM6mb")
DRUM_CHANNEL, DRUM_BANK = 9, 128
BLOCK_SAMPLES = 64  # events are placed on this grid (1.3 ms), the synthesizer's own
MOST_VOICES = 96
_RING_SECONDS = 3.0  # that a note may sound on after its end


@dataclass(kw_only=True)
class Part:
    """One instrument: a General MIDI program (or a drum kit) and its notes."""

    program: int
    is_drums: bool = False
    pan: float = 0.5  # 0 = left, 1 = right
    notes: list[tuple[float, float, int, int]] = field(default_factory=list)  # start, end, pitch, velocity

    def listed(self) -> list:
        """The part as a manifest has it, times in milliseconds: `Item.band`."""
        notes = [[round(start, 3), round(end, 3), int(pitch), int(v)] for start, end, pitch, v in self.notes]
        return [self.program, self.is_drums, notes]


def find_sound_font(path: str | Path | None = None) -> Path:
    """The given sound font, or the best one in the standard places."""
    if path is not None:
        if not Path(path).is_file():
            raise DataError(f"the sound font {path} does not exist; give a .sf2, .sf3 or .sfz file")
        return Path(path)
    found = [file for folder in SOUND_FONT_FOLDERS for file in sorted(Path(folder).glob("*.sf[23]"))]
    for name in (*PREFERRED, ""):
        for file in found:
            if file.name.startswith(name):
                return file
    raise DataError(
        f"no sound font in {', '.join(SOUND_FONT_FOLDERS)}; install musescore-general-soundfont-small "
        "(apt-get) or name a file"
    )


class SoundFont:
    """A loaded sound font; loading decodes all samples (seconds), rendering is many times real time."""

    def __init__(self, path: Path) -> None:
        try:
            import tinysoundfont
        except ImportError as error:
            raise DataError("tinysoundfont is missing; run: pip install --no-deps tinysoundfont") from error
        self.synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE_HZ, gain=-6)
        try:
            self.font = self.synth.sfload(str(path), max_voices=MOST_VOICES)
        except RuntimeError as error:
            raise DataError(f"{path} is not a sound font: {error}") from error

    def render(self, parts: Sequence[Part], seconds: float) -> np.ndarray:
        """The parts together: float32 [2, samples]; notes still sounding at the end are cut."""
        samples = round(seconds * SAMPLE_RATE_HZ)
        if not any(part.notes for part in parts):
            return np.zeros((2, samples), dtype=np.float32)
        self.synth.sounds_off()
        # Voices of the last item die out within the shortest release; this block is thrown away.
        self.synth.generate(BLOCK_SAMPLES * 64)
        events: list[tuple[int, int, int, int, int]] = []  # block, kind (0 = off), channel, pitch, velocity
        channels = iter([*range(DRUM_CHANNEL), *range(DRUM_CHANNEL + 1, 16)])
        for part in parts:
            channel = DRUM_CHANNEL if part.is_drums else next(channels)
            self._select(channel, part)
            self.synth.control_change(channel, 10, int(part.pan * 127))
            for start, end, pitch, velocity in part.notes:
                if not 0 <= pitch <= 127:
                    continue
                first = round(start * SAMPLE_RATE_HZ / BLOCK_SAMPLES)
                last = max(round(end * SAMPLE_RATE_HZ / BLOCK_SAMPLES), first + 1)
                events.append((first, 1, channel, pitch, velocity))
                events.append((last, 0, channel, pitch, 0))
        wave = np.zeros((samples + BLOCK_SAMPLES, 2), dtype=np.float32)
        view = memoryview(wave.data).cast("B")
        blocks, position = samples // BLOCK_SAMPLES + 1, 0
        for block, kind, channel, pitch, velocity in sorted(events):
            if block >= blocks:
                break
            if block > position:
                self._fill(view, position, block)
                position = block
            if kind:
                self.synth.noteon(channel, pitch, velocity)
            else:
                self.synth.noteoff(channel, pitch)
        self._fill(view, position, blocks)
        return np.ascontiguousarray(wave[:samples].T)

    def _fill(self, view: memoryview, start: int, end: int) -> None:
        width = BLOCK_SAMPLES * 2 * 4  # stereo float32
        if end > start:
            self.synth.generate_simple((end - start) * BLOCK_SAMPLES, view[start * width : end * width])

    def _select(self, channel: int, part: Part) -> None:
        bank = DRUM_BANK if part.is_drums else 0
        # A small font may lack the program: the first of its family, or the font's first, stands in.
        wanted = [part.program, *([] if part.is_drums else [part.program // 8 * 8]), 0]
        for program in wanted:
            try:
                self.synth.program_select(channel, self.font, bank, program, part.is_drums)
                return
            except RuntimeError:
                continue
        raise DataError(f"the sound font has no program {part.program}; use a General MIDI one")


class SfzInstrument:
    """A loaded SFZ file: one instrument, in which all parts are played."""

    def __init__(self, path: Path) -> None:
        try:
            import pysfizz
        except ImportError as error:
            raise DataError("pysfizz, which plays .sfz, is missing; run: pip install pysfizz") from error
        self.synth = pysfizz.Synth(sample_rate=SAMPLE_RATE_HZ, block_size=BLOCK_SAMPLES)
        if not self.synth.load_sfz_file(path):
            raise DataError(f"{path} is not an instrument that can be played; give another .sfz")

    def render(self, parts: Sequence[Part], seconds: float) -> np.ndarray:
        """The parts together: float32 [2, samples]; notes still sounding at the end are cut."""
        wave = np.zeros((2, round(seconds * SAMPLE_RATE_HZ)), dtype=np.float32)
        for start, end, pitch, velocity in (note for part in parts for note in part.notes):
            first = round(start * SAMPLE_RATE_HZ)
            if pitch in self.synth.playable_keys and first < wave.shape[-1]:
                length = max(end - start, BLOCK_SAMPLES / SAMPLE_RATE_HZ)
                sound = self.synth.render_note(pitch, velocity, length, length + _RING_SECONDS)
                room = wave[:, first : first + sound.shape[-1]]
                room += sound[:, : room.shape[-1]]
        return wave


class Players:
    """Plays every part of a band alone: all by a sound font, or the keys by an SFZ and the others by a font.

    path: of the font or SFZ; None: an installed font. Raises DataError where there is none, or it is none.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        found = find_sound_font(path)
        self._font: SoundFont | None = None
        self._keys: SoundFont | SfzInstrument | None = None
        if found.suffix.lower() != ".sfz":
            self._font = self._keys = SoundFont(found)
            return
        self._keys = SfzInstrument(found)
        with suppress(DataError):  # then it plays alone
            self._font = SoundFont(find_sound_font())

    def play(self, parts: Mapping[str, Part], seconds: float) -> dict[str, np.ndarray]:
        """The parts that can be played, each float32 [2, samples]."""
        players = {name: self._keys if name == "keys" else self._font for name in parts}
        return {
            name: player.render([parts[name]], seconds)
            for name, player in players.items()
            if player is not None and parts[name].notes
        }
