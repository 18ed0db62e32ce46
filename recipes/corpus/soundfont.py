"""Renders the band's parts with a General MIDI sound font (tinysoundfont)."""

from pathlib import Path

import numpy as np

from duotok.recipes.corpus.band import Part
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError

SOUND_FONT_FOLDERS = ("/usr/share/sounds/sf3", "/usr/share/sounds/sf2", "/usr/local/share/sounds")
PREFERRED = ("MuseScore_General", "FluidR3", "default-GM", "TimGM6mb")
DRUM_CHANNEL, DRUM_BANK = 9, 128
BLOCK_SAMPLES = 64  # events are placed on this grid (1.3 ms), the synthesizer's own
MOST_VOICES = 96


def find_sound_font(path: str | Path | None = None) -> Path:
    """The given sound font, or the best one in the standard places."""
    if path is not None:
        if not Path(path).is_file():
            raise DataError(f"the sound font {path} does not exist; give a .sf2 or .sf3 file")
        return Path(path)
    found = [
        file
        for folder in SOUND_FONT_FOLDERS
        if Path(folder).is_dir()
        for file in sorted(Path(folder).glob("*.sf[23]"))
    ]
    for name in PREFERRED:
        for file in found:
            if file.name.startswith(name):
                return file
    if found:
        return found[0]
    raise DataError(
        f"no sound font in {', '.join(SOUND_FONT_FOLDERS)}; install musescore-general-soundfont-small "
        "(apt-get) or give --sound-font FILE"
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

    def render(self, parts: list[Part], seconds: float) -> np.ndarray:
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
        try:
            self.synth.program_select(channel, self.font, bank, part.program, part.is_drums)
        except RuntimeError:
            # A small font may lack the program: the first of its family (or the standard kit) stands in.
            family = 0 if part.is_drums else part.program // 8 * 8
            try:
                self.synth.program_select(channel, self.font, bank, family, part.is_drums)
            except RuntimeError as error:
                raise DataError(
                    f"the sound font has no program {part.program}; use a General MIDI one"
                ) from error
