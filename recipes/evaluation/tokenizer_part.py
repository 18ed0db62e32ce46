"""What codes keep and say, and what making them costs: tokens, encoding, lyrics, music read out of them.

Read-outs from three sources are judged by the same readers: the codes, the audio's own chroma and mel (how
much the codes lose), and a constant guess (what is right without listening).
"""

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import mir_eval
import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.metrics import code_counts, normalized_entropy, utilization
from duotok.lm.sheet.columns import CHORD, UNKNOWN, write_sheet
from duotok.lm.sheet.reader import SheetReader
from duotok.lm.sheet.timeline import find_meter, places_between
from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of, join_items, read_items
from duotok.recipes.evaluation.speed import CORES, on_cores
from duotok.recipes.lm.sheets import agree, label_frames, measure_agreement
from duotok.recipes.tokenizer.train_harmony_reader import is_labelled
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import HOP_SAMPLES, TRACKS, DuoTokenizer, ReadOut
from duotok.tokenizer.music.chroma import CHROMA_RATE_HZ, at_chroma_rate, estimate_activity
from duotok.tokenizer.music.harmony import estimate_chords, read_key
from duotok.tokenizer.music.labels import key_of, triad_of
from duotok.tokenizer.spectra import level_gain

_SONG_SECONDS = 180.0
_GAINS_DB = (6.0, -6.0)
_FILE_RATE_HZ = 44_100
_TIMINGS = 3
_GUESSED_BAR_SECONDS = 2.4  # four beats at 100 per minute
_LONGEST_SECONDS = 60.0
_SOUNDING_DB = -45.0  # RMS of 40 ms; 25 dB below the level that the active parts are brought to
Chord = tuple[float, float, str]  # start, end in seconds, label


def measure_tokenizer(settings: Settings) -> dict[str, float]:
    """Mel L1, chroma correlation, utilization, normalized entropy and number of tokens per track.

    Mel and chroma on excerpts; the use of the codebooks on everything that the test items hold.
    """
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    items, excerpts = read_items(settings), excerpts_of(settings)
    figures: dict[str, float] = {"excerpts": len(excerpts), "items": len(items)}
    for track in TRACKS:
        errors, correlations = [], []
        for excerpt in tqdm(excerpts, desc=f"tokenizer, {track}: read-out", disable=None):
            wave = excerpt.read(track)[None]
            target = tokenizer.targets(wave)
            found = tokenizer.read_out(tokenizer.encode(wave, track), track)
            errors.append(float((found.mel - target.mel).abs().mean()))
            correlations.append(frame_correlation(found.chroma[0], target.chroma[0]))
        counts = torch.zeros(tokenizer.codebook_size(track), dtype=torch.int64)
        for item in tqdm(items, desc=f"tokenizer, {track}: codebook", disable=None):
            counts += code_counts(tokenizer.encode(item.read(track)[None], track), len(counts))
        figures |= {
            f"{track}_mel_l1": float(np.mean(errors)),
            f"{track}_chroma_correlation": float(np.mean(correlations)),
            f"{track}_utilization": utilization(counts),
            f"{track}_normalized_entropy": normalized_entropy(counts),
            f"{track}_test_tokens": int(counts.sum()),
        }
    return figures


def frame_correlation(found: Tensor, target: Tensor) -> float:
    """Mean over frames of the correlation of mean-free chroma [frames, 12].

    Frames without pitch in the target are left out; 0.0 when it has no others.
    """
    found, target = (chroma - chroma.mean(dim=-1, keepdim=True) for chroma in (found, target))
    heard = target.norm(dim=-1) > 1e-4
    if not bool(heard.any()):
        return 0.0
    return float(torch.nn.functional.cosine_similarity(found[heard], target[heard], dim=-1, eps=1e-6).mean())


def measure_encoding(settings: Settings) -> dict[str, float]:
    """Share of equal tokens per track under each treatment, and seconds of encoding per second of audio.

    Chunks are compared on test songs joined to 180 s, the rest on excerpts of 20 s.
    """
    folder = settings.bundle / "tokenizer"
    tokenizer, one_pass = DuoTokenizer.from_pretrained(folder), OnePassTokenizer.from_pretrained(folder)
    items, excerpts = read_items(settings), excerpts_of(settings)
    song_seconds = min(settings.seconds or _SONG_SECONDS, sum(item.seconds for item in items))
    figures: dict[str, float] = {"excerpts": len(excerpts), "song_seconds": song_seconds}
    for track in TRACKS:
        song = join_items(items, track, song_seconds)[None]
        figures[f"{track}_chunked_equal"] = compare_chunks(tokenizer, one_pass, song, track)
        shares: dict[str, list[float]] = {}
        for excerpt in tqdm(excerpts, desc=f"encoding, {track}", disable=None):
            for name, share in compare_treatments(tokenizer, excerpt.read(track), track).items():
                shares.setdefault(name, []).append(share)
        figures |= {f"{track}_{name}": float(np.mean(values)) for name, values in shares.items()}
        if settings.speed:
            seconds = time_encoding(tokenizer, song, track)
            figures[f"{track}_seconds_per_second"] = seconds / song_seconds
            figures[f"{track}_times_real_time"] = song_seconds / seconds
    return figures


class OnePassTokenizer(DuoTokenizer):
    """The same tokenizer, all of a recording at once, in as much memory as that takes."""

    CHUNK_FRAMES = 10**9


def compare_chunks(tokenizer: DuoTokenizer, one_pass: DuoTokenizer, wave: Tensor, track: str) -> float:
    """Share of the tokens of wave [1, channels, samples] that are those of one pass over all of it."""
    return share_equal(tokenizer.encode(wave, track), one_pass.encode(wave, track))


def compare_treatments(tokenizer: DuoTokenizer, wave: Tensor, track: str) -> dict[str, float]:
    """Share of the tokens of wave [2, samples] that survive a gain, and a 16-bit file at 44.1 kHz."""
    treated = {
        f"gain_{'plus' if gain_db > 0 else 'minus'}_{abs(gain_db):.0f}_db_equal": wave * 10 ** (gain_db / 20)
        for gain_db in _GAINS_DB
    }
    treated["resampled_equal"] = through_file(wave)
    codes = tokenizer.encode(wave[None], track)
    return {name: share_equal(tokenizer.encode(found[None], track), codes) for name, found in treated.items()}


def through_file(wave: Tensor) -> Tensor:
    """wave [channels, samples] as it comes back from a 16-bit file at 44.1 kHz."""
    samples = soxr.resample(wave.T.numpy(), SAMPLE_RATE_HZ, _FILE_RATE_HZ, quality="HQ")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wave.wav"
        soundfile.write(path, samples, _FILE_RATE_HZ, subtype="PCM_16")
        back = read_audio(path, channels=len(wave))
    missing = wave.shape[-1] - back.shape[-1]  # resampling twice rounds the length twice
    return torch.nn.functional.pad(back, (0, missing)) if missing > 0 else back[:, : wave.shape[-1]]


def share_equal(first: Tensor, second: Tensor) -> float:
    """Share of equal codes in the frames that both [1, frames] have."""
    frames = min(first.shape[1], second.shape[1])
    return float((first[:, :frames] == second[:, :frames]).float().mean())


def time_encoding(tokenizer: DuoTokenizer, wave: Tensor, track: str) -> float:
    """Seconds of one encoding of wave [1, channels, samples] on two cores: the best of three."""
    timings = []
    with on_cores(CORES):
        for _ in range(_TIMINGS):
            began = time.perf_counter()
            tokenizer.encode(wave, track)
            timings.append(time.perf_counter() - began)
    return min(timings)


def measure_lyrics(settings: Settings) -> dict[str, float]:
    """Edit distance over reference tokens on sung excerpts (P 3.2), in all and for voices by name.

    Returns nothing for a tokenizer without lyric head. Saying nothing costs 1.
    """
    excerpts = excerpts_of(settings, 49)
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    vocabulary = tokenizer.text
    if vocabulary is None:
        return {}
    errors, lengths = Counter[str](), Counter[str]()
    for excerpt in tqdm(excerpts, desc="lyrics", disable=None):
        start = excerpt.start_seconds
        wanted = vocabulary.encode(excerpt.item.text_between(start, start + excerpt.seconds))
        if not wanted:
            continue
        codes = tokenizer.encode(excerpt.read("vocal")[None], "vocal")
        found = vocabulary.encode(tokenizer.read_text(codes, "vocal")[0])
        errors[excerpt.item.voice] += edit_distance(found, wanted)
        lengths[excerpt.item.voice] += len(wanted)
    if not lengths:
        return {}
    rates = {voice: errors[voice] / lengths[voice] for voice in sorted(lengths)}
    return {
        "token_error_rate": errors.total() / lengths.total(),
        "token_error_rate_worst_voice": max(rates.values()),
        "tokens": lengths.total(),
        **{f"token_error_rate_{voice}": rate for voice, rate in rates.items()},
    }


def edit_distance(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Least number of insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(wanted) + 1))
    for number, token in enumerate(found, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(wanted, start=1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (token != other))
            diagonal, row[place] = row[place], best
    return row[-1]


def measure_readouts(settings: Settings) -> dict[str, float]:
    """Accuracy of chords (mir_eval majmin, weighted by duration) and keys, and F1 of activity, per track.

    Names without an ending are read from codes, those that end in _audio from the audio's chroma and mel.
    sheet_: what the language model's reader of lead sheets makes of the vocal.
    """
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    excerpts = choose_labelled(read_items(settings), settings)
    figures: dict[str, float] = {"excerpts": len(excerpts)}
    for track in TRACKS:
        told, heard, sounding = [], [], []
        for excerpt in tqdm(excerpts, desc=f"readouts, {track}", disable=None):
            wave = excerpt.read(track)[None]
            told.append(tokenizer.read_out(tokenizer.encode(wave, track), track))
            heard.append(tokenizer.targets(wave))
            sounding.append(find_sound(wave))
        for ending, readings in (("", told), ("_audio", heard)):
            found = judge(readings, sounding, excerpts, track)
            figures |= {f"{key}_{track}{ending}": value for key, value in found.items()}
        share = float(np.concatenate(sounding).mean())
        figures[f"activity_f1_{track}_constant"] = 2 * share / (1 + share)  # always on
    lm = DualTrackLM.from_pretrained(settings.bundle / "lm")
    if lm.sheet_reader is not None:
        figures |= measure_sheets(lm.sheet_reader, tokenizer, excerpts)
    return figures | guess(excerpts)


def choose_labelled(items: Sequence[Item], settings: Settings) -> list[Excerpt]:
    """The first minute of every test item with chords and key; of `settings.items` of them chosen by seed."""
    labelled = [item for item in items if is_labelled(item)]
    if not labelled:
        raise DataError("no test item has chords and a key to compare with")
    order = np.random.default_rng(settings.seed).permutation(len(labelled))[: settings.items]
    longest = settings.seconds or _LONGEST_SECONDS
    return [
        Excerpt(item=labelled[index], start_seconds=0.0, seconds=min(labelled[index].seconds, longest))
        for index in sorted(order)
    ]


def judge(
    readings: Sequence[ReadOut], sounding: Sequence[np.ndarray], excerpts: Sequence[Excerpt], track: str
) -> dict[str, float]:
    """The figures of one track from one source, named without both.

    readings: batches of one; sounding: [frames] what the waves say.
    """
    chords, keys, hits, said = [], [], 0, 0
    for told, truly, excerpt in zip(readings, sounding, excerpts, strict=True):
        active = estimate_activity(told.mel[0])
        chroma = told.chroma[0].double().numpy()
        found = estimate_chords(chroma, CHROMA_RATE_HZ, sounding=at_chroma_rate(active))
        chords.append(compare_chords(found, excerpt.item.chords, excerpt.seconds))
        keys.append(compare_keys(read_out_key(told, track), excerpt.item.key))
        hits += int((active & truly).sum())
        said += int(active.sum())
    exact, near = np.mean(keys, axis=0)
    return {
        "chord_accuracy": _overall(chords),
        "key_accuracy": float(exact),
        "key_accuracy_or_relative": float(near),
        "activity_f1": 2 * hits / max(said + int(np.concatenate(sounding).sum()), 1),
    }


def read_out_key(told: ReadOut, track: str) -> str | None:
    """Key of a read-out (a batch of one) as `generate` reads it; None where nothing sounds."""
    chroma = told.chroma[0].cpu().double().numpy()
    sounding = at_chroma_rate(estimate_activity(told.mel[0]))
    key = read_key(chroma, CHROMA_RATE_HZ, track, sounding=sounding[: len(chroma)])
    return None if key is None else str(key)


def guess(excerpts: Sequence[Excerpt]) -> dict[str, float]:
    """What the commonest chord and key of these excerpts would have reached."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for excerpt in excerpts:
        for start, end, label in excerpt.item.chords:
            if triad_of(label) >= 0:
                seconds[label.split(":")[0] + (":min" if triad_of(label) >= 12 else ":maj")] += end - start
    chord = max(seconds, key=lambda name: seconds[name])
    key = Counter(excerpt.item.key for excerpt in excerpts).most_common(1)[0][0]
    chords = [compare_chords([(0.0, e.seconds, chord)], e.item.chords, e.seconds) for e in excerpts]
    exact, near = np.mean([compare_keys(key, excerpt.item.key) for excerpt in excerpts], axis=0)
    return {
        "chord_accuracy_constant": _overall(chords),
        "key_accuracy_constant": float(exact),
        "key_accuracy_or_relative_constant": float(near),
    }


def measure_sheets(
    reader: SheetReader, tokenizer: DuoTokenizer, excerpts: Sequence[Excerpt]
) -> dict[str, float]:
    """Agreement of the read sheets, and (_constant) of steady bars and these songs' commonest chord.

    meter_right: share of the songs whose meter is read; _in_3: of those that have three beats in a bar.
    """
    songs, meters = [], list[tuple[int, bool]]()
    for excerpt in tqdm(excerpts, desc="readouts, lead sheet", disable=None):
        codes = tokenizer.encode(excerpt.read("vocal")[None], "vocal")[0]
        written = label_frames(excerpt.item, tokenizer.frame_rate_hz)[: len(codes)]
        songs.append((codes[: len(written)], written))
        place = reader.listen(codes[None].long())["place"][0].double().numpy()
        meter = excerpt.item.beats_per_bar
        meters.append((meter, find_meter(place, tokenizer.frame_rate_hz) == meter))
    known = (chord for _, written in songs for chord in written[:, CHORD].tolist() if chord != UNKNOWN)
    commonest, bar = Counter(known).most_common(1)[0][0], _GUESSED_BAR_SECONDS * tokenizer.frame_rate_hz

    def constant(frames: int) -> Tensor:
        places = places_between(np.arange(0, frames + 2 * bar, bar), frames)
        return write_sheet(places, np.full(frames, commonest))

    figures = {f"sheet_{name}": value for name, value in measure_agreement(reader, songs).items()}
    figures["sheet_meter_right"] = float(np.mean([right for _, right in meters]))
    for beats in sorted({meter for meter, _ in meters}):
        own = [right for meter, right in meters if meter == beats]
        figures |= {
            f"sheet_meter_songs_in_{beats}": len(own),
            f"sheet_meter_right_in_{beats}": float(np.mean(own)),
        }
    guessed = agree((constant(len(codes)), written) for codes, written in songs)
    return figures | {f"sheet_{name}_constant": value for name, value in guessed.items()}


def compare_chords(found: Sequence[Chord], wanted: Sequence[Chord], seconds: float) -> tuple[float, float]:
    """Seconds with the right chord (mir_eval majmin), and those that count, in the first `seconds`."""
    reference = [(start, min(end, seconds), label) for start, end, label in wanted if start < seconds]
    intervals, labels = _split(reference)
    none = mir_eval.chord.NO_CHORD
    found_intervals, found_labels = mir_eval.util.adjust_intervals(
        *_split(found), t_min=intervals.min(), t_max=intervals.max(), start_label=none, end_label=none
    )
    merged, reference_labels, found_labels = mir_eval.util.merge_labeled_intervals(
        intervals, labels, found_intervals, found_labels
    )
    durations = mir_eval.util.intervals_to_durations(merged)
    scores = mir_eval.chord.majmin(reference_labels, found_labels)
    counts = scores >= 0  # -1: neither major nor minor
    return float((scores * durations)[counts].sum()), float(durations[counts].sum())


def compare_keys(found: str | None, wanted: str | None) -> tuple[bool, bool]:
    """Whether a key is right, and whether it is right or the relative one."""
    if found is None or wanted is None:
        return False, False
    key = key_of(wanted)
    relative = 12 + (key + 9) % 12 if key < 12 else (key + 3) % 12
    return key_of(found) == key, key_of(found) in (key, relative)


def find_sound(wave: Tensor) -> np.ndarray:
    """Whether each 40 ms of wave [1, channels, samples] is within 25 dB of the active level: [frames]."""
    mono = wave.mean(dim=1)
    mono = torch.nn.functional.pad(mono, (0, -mono.shape[-1] % HOP_SAMPLES))
    power = (mono * level_gain(mono)).unflatten(-1, (-1, HOP_SAMPLES)).square().mean(dim=-1)[0]
    return (10 * power.clamp_min(1e-12).log10() > _SOUNDING_DB).numpy()


def _split(chords: Sequence[Chord]) -> tuple[np.ndarray, list[str]]:
    return np.array([chord[:2] for chord in chords], dtype=float), [chord[2] for chord in chords]


def _overall(shares: Sequence[tuple[float, float]]) -> float:
    """All seconds alike, whichever excerpt they are in."""
    return sum(right for right, _ in shares) / max(sum(counted for _, counted in shares), 1e-9)
