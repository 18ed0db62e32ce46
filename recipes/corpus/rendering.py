"""Makes one item of PopBand from (seed, split, index): draws it, sings it, plays it, mixes it, writes it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from duotok.recipes.corpus.band import Band
from duotok.recipes.corpus.excerpt import Excerpt, cut_excerpt, label_chords
from duotok.recipes.corpus.manifest import SPLITS, Item
from duotok.recipes.corpus.mixing import Mix, mix_stems
from duotok.recipes.corpus.pop909 import Note, Songs
from duotok.recipes.corpus.singing import draw_manner, sing
from duotok.recipes.corpus.soundfont import SoundFont
from duotok.recipes.corpus.speech import unpack_kokoro
from duotok.recipes.corpus.styles import STYLES
from duotok.recipes.corpus.voicebank import VoiceBank, bank_path, build_bank, load_bank, save_bank
from duotok.recipes.corpus.voices import VOICES, Voice, voices_of_split
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.files import whole_folder
from duotok.tokenizer.heads import STEMS

MOST_STRETCH = np.log(1.15)  # tempo within 15 %
MOST_SEMITONES = 6


def prepare_voices(folder: Path, phrases: int, workers: int) -> None:
    """Build the missing voice banks, several voices at a time."""
    missing = [voice for voice in VOICES if not bank_path(folder, voice, phrases).exists()]
    if not missing:
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from tqdm import tqdm

    if any(voice.engine == "kokoro" for voice in missing):
        unpack_kokoro()
    pool = ProcessPoolExecutor(min(workers, len(missing)), multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(_prepare_voice, folder, voice, phrases) for voice in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="voices", unit="voice"):
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_voice(folder: Path, voice: Voice, phrases: int) -> None:
    save_bank(bank_path(folder, voice, phrases), build_bank(voice, phrases))


def place_melody(excerpt: Excerpt, voice: Voice) -> tuple[tuple[Note, ...], float]:
    """The melody in the octave that suits the voice, and how far (mean semitones) it leaves the range."""
    pitches = np.array([note.pitch for note in excerpt.melody])
    costs = {
        octave: float(
            np.mean(
                np.maximum(pitches + 12 * octave - voice.highest, 0)
                + np.maximum(voice.lowest - pitches - 12 * octave, 0)
            )
        )
        for octave in range(-4, 3)
    }
    best = min(costs, key=lambda octave: (costs[octave], abs(octave)))
    melody = tuple(replace(note, pitch=note.pitch + 12 * best) for note in excerpt.melody)
    return melody, costs[best]


class ItemMaker:
    """Renders items of one split; keeps the sound font, songs and voice banks in memory."""

    def __init__(
        self,
        *,
        songs: Path,
        out: Path,
        split: str,
        seed: int,
        sound_font: Path,
        voice_cache: Path,
        phrases: int,
    ) -> None:
        self.songs, self.out, self.split, self.seed = Songs(songs), out, split, seed
        self.names = self.songs.of_split(split)
        self.sound_font = SoundFont(sound_font)
        self.voice_cache, self.phrases = voice_cache, phrases
        self.banks: dict[str, VoiceBank] = {}

    def song_name(self, index: int) -> str:
        """The song of an item: all songs of the split come before any comes again."""
        turn, place = divmod(index, len(self.names))
        order = np.random.default_rng([self.seed, SPLITS.index(self.split), 1, turn]).permutation(
            len(self.names)
        )
        return self.names[order[place]]

    def bank(self, voice: Voice) -> VoiceBank:
        """The voice's bank, read once."""
        if voice.name not in self.banks:
            self.banks[voice.name] = load_bank(bank_path(self.voice_cache, voice, self.phrases))
        return self.banks[voice.name]

    def make(self, index: int) -> Item:
        """Render item `index` into its folder, unless it is there already in full."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), 0, index])
        song = self.songs.read(self.song_name(index))
        voices = voices_of_split(self.split)
        voice = voices[rng.integers(len(voices))]
        style = STYLES[rng.integers(len(STYLES))]
        stretch = float(np.exp(rng.uniform(-MOST_STRETCH, MOST_STRETCH)))
        # Of three random keys take the first in the voice's range, else the one that leaves it least.
        keys = rng.integers(-MOST_SEMITONES, MOST_SEMITONES + 1, size=3)
        cut_seed = int(rng.integers(2**31))
        choices = []
        for semitones in keys:
            excerpt = cut_excerpt(
                song, np.random.default_rng(cut_seed), stretch=stretch, semitones=int(semitones)
            )
            melody, cost = place_melody(excerpt, voice)
            choices.append((cost, excerpt, melody))
        _, excerpt, melody = min(choices, key=lambda choice: choice[0])
        manner = draw_manner(rng, voice.formant)
        vocal, texts = sing(melody, self.bank(voice), manner, excerpt.seconds, rng)
        parts = Band(excerpt, style, rng).arrange()
        band = {stem: self.sound_font.render(parts[stem], excerpt.seconds) for stem in STEMS[1:]}
        fade_out(vocal)
        for wave in band.values():
            fade_out(wave)
        mix = mix_stems(vocal, band, rng)
        name = f"{self.split}-{index:05d}"
        self._write(name, mix)
        return Item(
            id=name,
            split=self.split,
            source="pop909",
            song=song.name,
            seconds=len(mix.mix) / SAMPLE_RATE_HZ,
            sample_rate_hz=SAMPLE_RATE_HZ,
            stems={stem: f"audio/{self.split}/{name}/{stem}.wav" for stem in STEMS},
            mix=f"audio/{self.split}/{name}/mix.wav",
            tempo_bpm=round(60 / excerpt.beat_seconds, 3),
            beats_seconds=[round(time, 4) for time in excerpt.beats],
            downbeats_seconds=[round(excerpt.beats[beat], 4) for beat in excerpt.downbeats],
            chords=label_chords(excerpt),
            key=excerpt.key,
            notes=[
                (round(note.start, 4), round(note.end, 4), note.pitch, text)
                for note, text in zip(melody, texts, strict=True)
            ],
            voice=voice.name,
            style=style.name,
            root=self.out,
        )

    def _write(self, name: str, mix: Mix) -> None:
        import soundfile

        folder = self.out / "audio" / self.split / name
        with whole_folder(folder) as temporary:
            for stem, wave in {**mix.stems, "mix": mix.mix}.items():
                soundfile.write(temporary / f"{stem}.wav", wave, SAMPLE_RATE_HZ, subtype="PCM_16")


def fade_out(wave: np.ndarray, seconds: float = 0.06) -> None:
    """Fade the last moment to silence, in place: the excerpt ends inside a song."""
    samples = int(seconds * SAMPLE_RATE_HZ)
    wave[..., -samples:] *= np.linspace(1, 0, samples, dtype=np.float32)
