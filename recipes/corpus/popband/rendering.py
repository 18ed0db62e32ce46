"""Makes one item of PopBand from (seed, split, index): draws it, sings it, plays it, mixes it, writes it."""

import functools
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from duotok.recipes.corpus.manifest import SPLITS, Item
from duotok.recipes.corpus.popband.band import IN_FOUR, Band, styles_for
from duotok.recipes.corpus.popband.grooves import Grooves
from duotok.recipes.corpus.popband.lyrics import transcribe_lyrics
from duotok.recipes.corpus.popband.singers import (
    add_third,
    call_by_phone,
    draw_singer,
    speak_phrases,
    vary_manner,
)
from duotok.recipes.corpus.popband.singing import Manner, draw_manner, sing
from duotok.recipes.corpus.popband.voicebank import VoiceBank, bank_path, build_bank, load_bank, save_bank
from duotok.recipes.corpus.popband.voices import VOICES, Voice, unpack_kokoro, voices_of_split
from duotok.recipes.corpus.scores.song import (
    RING_SECONDS,
    Excerpt,
    Note,
    Song,
    cut_excerpt,
    label_chords,
    whole_song,
)
from duotok.recipes.corpus.scores.sources import open_songs
from duotok.recipes.workers.pool import Workers
from duotok.renderer.sound_font import SoundFont
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import whole_folder
from duotok.tokenizer.heads import STEMS

if TYPE_CHECKING:
    from duotok.tokenizer.model import DuoTokenizer

MOST_STRETCH = np.log(1.15)  # tempo within 15 %
MOST_SEMITONES = 6
LOWEST_SUNG, HIGHEST_SUNG = 36, 88  # MIDI pitch, of singers in another octave
FULL_SCALE = 32_767
HEADROOM = 0.97  # highest peak of the mix
LEVEL_FRAME = 2_400  # samples; 50 ms
COMPRESSOR_FRAME = 480  # samples; 10 ms
EQUALIZER_TAPS = 2_048
BALANCE_DB = {"drums": (-2.0, 2.5), "bass": (-1.0, 2.0), "other": (0.0, 2.0)}  # mean, spread


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Finished stems as int16 [samples, channels]; mix = vocal + drums + bass + other."""

    stems: dict[str, np.ndarray]
    mix: np.ndarray


def mix_stems(vocal: np.ndarray, band: dict[str, np.ndarray], rng: np.random.Generator) -> Mix:
    """Mix a dry vocal [samples] with dry band stems [2, samples], all float32 at 48 kHz."""
    room_seconds = rng.uniform(0.25, 1.8)
    wet_db = {"vocal": rng.uniform(-28, -12), "drums": rng.uniform(-30, -15), "other": rng.uniform(-26, -12)}
    voice = compress(normalize(vocal[None], 0.1), rng.uniform(1.5, 4.0))
    voice = color(voice, room_seconds, wet_db["vocal"], rng, low_cut_hz=rng.uniform(60, 130))
    voice_level = 10 ** (rng.uniform(-20, -16) / 20)
    voice = normalize(voice, voice_level)
    parts = {}
    for name in ("drums", "bass", "other"):
        mean, spread = BALANCE_DB[name]
        wave = normalize(band[name], 0.1)
        if name == "bass":
            wave = wave.mean(axis=0, keepdims=True)  # bass stays in the middle, and is stored as mono
        wave = compress(wave, rng.uniform(1.0, 3.0)) if name != "other" else wave
        wave = color(wave, room_seconds, wet_db.get(name), rng, low_cut_hz=rng.uniform(20, 40))
        parts[name] = normalize(wave, 10 ** (rng.normal(mean, spread) / 20))
    together = parts["drums"] + parts["bass"] + parts["other"]
    accompaniment_level = voice_level * 10 ** (rng.uniform(-4, 6) / 20)
    gain = accompaniment_level / max(active_level(together), 1e-6)
    parts = {name: wave * np.float32(gain) for name, wave in parts.items()}
    if rng.random() < 0.15:  # what the singer's microphone or a separator lets through
        voice = voice + together.mean(axis=0, keepdims=True) * np.float32(
            gain * 10 ** (rng.uniform(-40, -28) / 20)
        )
    if rng.random() < 0.6:  # microphone noise
        noise = rng.standard_normal(voice.shape, dtype=np.float32)
        voice = voice + noise * np.float32(voice_level * 10 ** (rng.uniform(-65, -45) / 20))
    return finish({"vocal": voice, **parts})


def finish(stems: dict[str, np.ndarray]) -> Mix:
    """Scale the stems so that nothing clips, round them to int16 and add them up."""
    total = np.sum([np.broadcast_to(wave, (2, wave.shape[-1])) for wave in stems.values()], axis=0)
    peak = max([float(np.abs(total).max()), *(float(np.abs(wave).max()) for wave in stems.values())])
    scale = FULL_SCALE * min(1.0, HEADROOM / max(peak, 1e-9))
    whole = {name: np.rint(wave * np.float32(scale)).astype(np.int16) for name, wave in stems.items()}
    mix = np.zeros(total.shape, dtype=np.int32)
    for wave in whole.values():
        mix += wave
    assert np.abs(mix).max() <= FULL_SCALE, "the headroom covers the rounding"
    return Mix(stems={name: wave.T for name, wave in whole.items()}, mix=mix.astype(np.int16).T)


def frame_levels(wave: np.ndarray, frame: int) -> np.ndarray:
    """RMS of consecutive frames over all channels of wave [channels, samples]; at least one frame."""
    count = max(1, wave.shape[-1] // frame)
    frame = min(frame, wave.shape[-1])
    frames = wave[:, : count * frame].reshape(len(wave), count, frame)
    return np.sqrt(np.einsum("cnf,cnf->n", frames, frames) / (len(wave) * frame))


def active_level(wave: np.ndarray) -> float:
    """RMS of the frames that are not much quieter than the loud ones."""
    levels = frame_levels(wave, LEVEL_FRAME)
    loud = float(np.quantile(levels, 0.95))
    active = levels[levels > 0.1 * loud]
    return float(np.sqrt(np.square(active).mean())) if loud > 1e-6 else 0.0


def normalize(wave: np.ndarray, level: float) -> np.ndarray:
    """The wave at the given active RMS; silence stays silence."""
    now = active_level(wave)
    return wave * np.float32(level / now) if now > 1e-6 else wave


def compress(wave: np.ndarray, ratio: float) -> np.ndarray:
    """Gentle compression above the active level, with 20 ms attack and 120 ms release."""
    if ratio <= 1.05:
        return wave
    levels = frame_levels(wave, COMPRESSOR_FRAME)
    threshold = max(active_level(wave), 1e-6)
    over = np.maximum(20 * np.log10(np.maximum(levels, 1e-6) / threshold), 0.0)
    smooth, state = np.empty_like(over), 0.0
    for index, value in enumerate(over):
        state += (value - state) * (0.5 if value > state else 0.08)
        smooth[index] = state
    gain = 10 ** (-smooth * (1 - 1 / ratio) / 20)
    # Straight lines between the frames, all frames at once.
    ramp = np.arange(COMPRESSOR_FRAME, dtype=np.float32) / COMPRESSOR_FRAME
    gain = np.append(gain, gain[-1]).astype(np.float32)
    lines = (gain[:-1, None] + np.diff(gain)[:, None] * ramp).ravel()
    curve = np.full(wave.shape[-1], gain[-1], dtype=np.float32)
    curve[: min(len(lines), len(curve))] = lines[: len(curve)]
    return wave * curve


def color(
    wave: np.ndarray,
    room_seconds: float,
    wet_db: float | None,
    rng: np.random.Generator,
    *,
    low_cut_hz: float,
) -> np.ndarray:
    """Equalizer (low cut, tilt, one broad bell) and room, in one pass over the spectrum."""
    from scipy.fft import next_fast_len
    from scipy.signal import oaconvolve

    tail = int(room_seconds * SAMPLE_RATE_HZ) if wet_db is not None else 0
    size = int(next_fast_len(tail + 2 * EQUALIZER_TAPS, real=True) or 0)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ).astype(np.float32)
    octaves = np.log2(np.maximum(frequency, 20.0) / 1_000).astype(np.float32)
    tilt_db, bell_db, bell = rng.uniform(-1.0, 1.0), rng.normal(0, 2.0), rng.uniform(-2.5, 3.0)
    curve_db = tilt_db * np.clip(octaves, -4, 4) + bell_db * np.exp(-0.5 * np.square(octaves - bell))
    curve = np.exp(curve_db * np.float32(np.log(10) / 20))
    # The magnitude of a second-order high-pass, with zero phase.
    ratio = np.square(np.square(frequency / np.float32(low_cut_hz)))
    curve *= np.sqrt(ratio / (1 + ratio))
    result = np.empty_like(wave)
    for channel in range(len(wave)):
        spectrum = curve.astype(np.complex64)
        if wet_db is not None:
            spectrum *= 1 + np.fft.rfft(make_room(room_seconds, wet_db, rng), size)
        # The equalizer reaches EQUALIZER_TAPS into the past: the filter is delayed and the sound moved back.
        taps = np.roll(np.fft.irfft(spectrum, size), EQUALIZER_TAPS)[: tail + 2 * EQUALIZER_TAPS]
        filtered = oaconvolve(wave[channel], taps.astype(np.float32))
        result[channel] = filtered[EQUALIZER_TAPS : EQUALIZER_TAPS + wave.shape[-1]]
    return result


def make_room(seconds: float, wet_db: float, rng: np.random.Generator) -> np.ndarray:
    """Reverberation without the direct sound: noise that decays by 60 dB in `seconds`, darker later on."""
    length = int(seconds * SAMPLE_RATE_HZ)
    delay = int(rng.uniform(0.004, 0.03) * SAMPLE_RATE_HZ)
    noise = rng.standard_normal(length, dtype=np.float32)
    time = np.arange(length, dtype=np.float32) / length
    # The dull part (a running mean of the noise) fades slower than the bright part.
    dull = np.convolve(noise, np.full(12, 1 / np.sqrt(12), dtype=np.float32), "same")
    tail = noise * np.exp(-11.0 * time) * 0.5 + dull * np.exp(-6.9 * time)
    tail[:delay] = 0.0
    tail *= 10 ** (wet_db / 20) / np.sqrt(np.square(tail).sum())
    return tail.astype(np.float32)


def prepare_voices(folder: Path, phrases: int, workers: Workers) -> None:
    """Build the missing voice banks, several voices at a time."""
    missing = [voice for voice in VOICES if not bank_path(folder, voice, phrases).exists()]
    if any(voice.engine == "kokoro" for voice in missing):
        unpack_kokoro()
    from tqdm import tqdm

    made = workers.run(missing, functools.partial(_prepare_voice, folder, phrases))
    for voice, failure in tqdm(made, total=len(missing), desc="voices", unit="voice", disable=not missing):
        if failure is not None:
            raise DataError(f"no voice {voice.name}: {failure}")


def _prepare_voice(folder: Path, phrases: int, voice: Voice) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Order:
    """What it takes to render any item of a split."""

    songs: Path
    out: Path
    split: str
    seed: int
    sound_font: Path
    voice_cache: Path
    phrases: int
    whole: bool = False  # each item is a whole song, in place of a random stretch of one
    name: str = ""  # part of the items' names, where several corpora are used together
    grooves: Path | None = None  # drummers' performances, for a share of the items
    tokenizer: Path | None = None  # its codes of an item are kept, in place of the audio
    meters: tuple[int, ...] = ()  # beats of a bar of the songs that are taken; empty: any

    def item_id(self, index: int) -> str:
        """Name of an item."""
        parts = (self.split, self.name, "whole" if self.whole else "", f"{index:05d}")
        return "-".join(part for part in parts if part)

    def count_items(self) -> int | None:
        """How many items there are at most: each song once if they are whole; None = any number."""
        return len(open_songs(self.songs).of_split(self.split)) if self.whole else None


@functools.cache
def _open_maker(order: Order) -> "ItemMaker":
    return ItemMaker(order)


def make_item(order: Order, index: int) -> tuple[Item, dict[str, np.ndarray]]:
    """An item and, where the order names a tokenizer, its codes; else its audio is written.

    One process reads the songs, the sound font and the tokenizer once.
    """
    maker = _open_maker(order)
    return (maker.make(index), {}) if order.tokenizer is None else maker.encode(*maker.render(index))


@functools.cache
def _open_tokenizer(folder: Path) -> "DuoTokenizer":
    import torch

    from duotok.tokenizer.model import DuoTokenizer

    torch.set_num_threads(1)
    return DuoTokenizer.from_pretrained(folder)


class ItemMaker:
    """Renders items of one split; keeps the sound font, songs and voice banks in memory."""

    def __init__(self, order: Order) -> None:
        self.order, self.split, self.seed = order, order.split, order.seed
        self.songs, self.out = open_songs(order.songs, order.out / "scores"), order.out
        self.names = self.songs.of_split(order.split)
        self.sound_font = SoundFont(order.sound_font)
        self.grooves = None if order.grooves is None else Grooves(order.grooves)
        self.banks: dict[str, VoiceBank] = {}

    def song_name(self, index: int) -> str:
        """The song of an item: all songs of the split come before any comes again."""
        turn, place = divmod(index, len(self.names))
        order = np.random.default_rng([self.seed, SPLITS.index(self.split), 1, turn]).permutation(
            len(self.names)
        )
        return self.names[order[place]]

    def song(self, index: int) -> Song:
        """The song of an item; of an order of some meters, any of those that are in one, each as likely."""
        meters = self.order.meters
        if not meters:
            return self.songs.read(self.song_name(index))
        chance = np.random.default_rng([self.seed, SPLITS.index(self.split), 3, index])
        for place in chance.permutation(len(self.names)):
            with suppress(DataError):  # a broken song is in no meter
                if (song := self.songs.read(self.names[place])).beats_per_bar in meters:
                    return song
        beats = " or ".join(map(str, meters))
        raise DataError(f"{self.songs.path} holds no {self.split} song of {beats} beats")

    def bank(self, voice: Voice) -> VoiceBank:
        """The voice's bank, read once."""
        if voice.name not in self.banks:
            self.banks[voice.name] = load_bank(bank_path(self.order.voice_cache, voice, self.order.phrases))
        return self.banks[voice.name]

    def make(self, index: int) -> Item:
        """Render item `index` into its folder."""
        item, mix = self.render(index)
        self._write(item.id, mix)
        return item

    def encode(self, item: Item, mix: Mix) -> tuple[Item, dict[str, np.ndarray]]:
        """An item that is kept without audio, and its codes [frames] by track."""
        import torch

        from duotok.recipes.lm.tokenize import encode_items

        assert self.order.tokenizer is not None
        # The waves as `Item.read` gives them, so that these are the codes of the files that are not written.
        stems = {
            name: torch.from_numpy(
                np.broadcast_to(wave, (len(wave), 2)).T.astype(np.float32) / (FULL_SCALE + 1)
            )
            for name, wave in mix.stems.items()
        }
        band = torch.stack([stems[name] for name in STEMS[1:]]).sum(dim=0)
        waves = {"vocal": stems["vocal"], "accompaniment": band}
        (codes,) = encode_items(
            [{track: wave.mean(dim=0, keepdim=True) for track, wave in waves.items()}],
            _open_tokenizer(self.order.tokenizer),
        )
        if isinstance(codes, str):
            raise DataError(codes)
        return replace(item, mix=""), codes

    def render(self, index: int) -> tuple[Item, Mix]:
        """Item `index` and its sound."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), 0, index])
        song = self.song(index)
        voices = voices_of_split(self.split)
        voice = voices[rng.integers(len(voices))]
        style_draw = rng.integers(len(IN_FOUR))
        stretch = float(np.exp(rng.uniform(-MOST_STRETCH, MOST_STRETCH)))
        # Of three random keys take the first in the voice's range, else the one that leaves it least.
        keys = rng.integers(-MOST_SEMITONES, MOST_SEMITONES + 1, size=3)
        cut_seed = int(rng.integers(2**31))
        choices = []
        for semitones in keys:
            if self.order.whole:
                excerpt = whole_song(song, stretch=stretch, semitones=int(semitones))
            else:
                excerpt = cut_excerpt(
                    song, np.random.default_rng(cut_seed), stretch=stretch, semitones=int(semitones)
                )
            melody, cost = place_melody(excerpt, voice)
            choices.append((cost, excerpt, melody))
        _, excerpt, melody = min(choices, key=lambda choice: choice[0])
        styles = styles_for(excerpt.beats_per_bar)
        style = styles[style_draw % len(styles)]
        manner = draw_manner(rng, voice.formant)
        sung_words = any(note.text for note in melody)
        words = transcribe_lyrics(melody, excerpt.language) if sung_words else []
        if self.split == "train":
            extra = np.random.default_rng([self.seed, SPLITS.index(self.split), 2, index])
            melody, vocal, texts = self._sing_really(excerpt, melody, words, voice, manner, rng, extra)
        else:
            vocal, texts = sing(melody, self.bank(voice), manner, excerpt.seconds, rng, words=words)
        parts = Band(excerpt, style, rng, breaks=self.split == "train", grooves=self.grooves).arrange()
        band = {stem: self.sound_font.render(parts[stem], excerpt.seconds) for stem in STEMS[1:]}
        fade_seconds = 0.8 * RING_SECONDS if self.order.whole else 0.06
        for wave in (vocal, *band.values()):
            fade_out(wave, fade_seconds)
        mix = mix_stems(vocal, band, rng)
        name = self.order.item_id(index)
        item = Item(
            id=name,
            split=self.split,
            source=song.source,
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
            keys=[(round(span.start, 4), round(span.end, 4), span.label) for span in excerpt.keys]
            if self.order.whole and len(excerpt.keys) > 1
            else [],
            notes=[
                (round(note.start, 4), round(note.end, 4), note.pitch, text)
                for note, text in zip(melody, texts, strict=True)
            ],
            voice=voice.name,
            style=style.name,
            band={stem: [part.listed() for part in own] for stem, own in parts.items()},
            beats_per_bar=excerpt.beats_per_bar,
            root=self.out,
        )
        return item, mix

    def _sing_really(
        self,
        excerpt: Excerpt,
        melody: tuple[Note, ...],
        words: list[str],
        voice: Voice,
        manner: Manner,
        rng: np.random.Generator,
        extra: np.random.Generator,
    ) -> tuple[tuple[Note, ...], np.ndarray, list[str]]:
        """The melody as it is sung, its sound [samples] and its syllables; extra: for the untidy."""
        singer, manner = draw_singer(extra), vary_manner(manner, extra)
        moved = tuple(replace(note, pitch=note.pitch + singer.octave) for note in melody)
        inside = all(LOWEST_SUNG <= note.pitch <= HIGHEST_SUNG for note in moved)
        notes, spoken = speak_phrases(moved if inside else melody, singer.spoken, voice.lowest, extra)
        vocal, texts = sing(notes, self.bank(voice), manner, excerpt.seconds, rng, spoken, words)
        if singer.in_thirds and not spoken:
            voices = voices_of_split(self.split)
            other = voices[extra.integers(len(voices))]
            third = add_third(notes, excerpt.key, extra)
            manner = replace(manner, formant=manner.formant * other.formant / voice.formant)
            second, _ = sing(third, self.bank(other), manner, excerpt.seconds, extra, words=words)
            level = 10 ** (extra.uniform(-10, -3) / 20)
            vocal = vocal + normalize(second[None], active_level(vocal[None]) * level)[0]
        if singer.room is not None:
            vocal = color(vocal[None], *singer.room, extra, low_cut_hz=60)[0]
        if singer.over_phone:
            vocal = call_by_phone(vocal, extra)
        return notes, vocal, texts

    def _write(self, name: str, mix: Mix) -> None:
        import soundfile

        folder = self.out / "audio" / self.split / name
        with whole_folder(folder) as temporary:
            for stem, wave in {**mix.stems, "mix": mix.mix}.items():
                soundfile.write(temporary / f"{stem}.wav", wave, SAMPLE_RATE_HZ, subtype="PCM_16")


def fade_out(wave: np.ndarray, seconds: float) -> None:
    """Fade the last seconds to silence, in place: an excerpt ends inside a song, a whole one rings out."""
    samples = int(seconds * SAMPLE_RATE_HZ)
    wave[..., -samples:] *= np.linspace(1, 0, samples, dtype=np.float32)
