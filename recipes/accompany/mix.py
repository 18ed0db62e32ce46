"""The waves on both sides of the model: the vocal, read and checked, and its mix with the band."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import AudioError
from duotok.tokenizer.common.files import shown_name
from duotok.tokenizer.common.long_waves import amplify, blocks, map_blocks, new_wave, peak
from duotok.tokenizer.common.loudness import measure_loudness

Source = str | Path | Tensor  # a file, or a wave [samples] or [channels, samples] at 48 kHz
SHORTEST_SECONDS = 1.0
_SILENT_PEAK = 1e-4  # -80 dBFS, three steps of 16 bits
_QUIET_PEAK = 1e-2
_RAISED_PEAK = 0.25  # what becomes of a quiet one's; a band beside it still fits under full scale
# Offsets beside what low tones leave in the mean: a share of a side's RMS, and two steps of 16 bits.
_OFFSET, _LEAST_OFFSET = 0.02, 6e-5
_NOTHING = 1e-12  # power: -120 dBFS
_SILENT_SIDE = 1e-4  # power beside the other side's: the noise of an input with nothing in it
_CANCELLING = -0.9  # correlation of the sides


@dataclass(frozen=True, kw_only=True)
class Vocal:
    """A usable vocal."""

    wave: Tensor  # [2, samples] at 48 kHz, peak <= 1
    name: str  # file name as it is shown, or "" for a tensor
    warnings: tuple[str, ...]

    @property
    def listened(self) -> Tensor:
        """What the tokenizer hears, [1, channels, samples]."""
        return self.wave[None]


def load_vocal(source: Source | Sequence[Source], *, what: str = "vocal") -> Vocal:
    """Read and check a vocal: a file of any rate and channel count, a wave at 48 kHz, or several takes.

    source: a path, or a tensor [samples] or [channels, samples]; takes are added up as they are, from one
    start, as long as the longest. what: what messages call it. Offsets, sides that cancel out or are silent,
    and very low levels are mended, and warned of. Raises AudioError when it cannot be read, is shorter than
    SHORTEST_SECONDS, silent, or holds NaN.
    """
    warnings: list[str] = []
    sources = [source] if isinstance(source, (str, Path, Tensor)) else source
    names = ["" if isinstance(take, Tensor) else shown_name(Path(take).name) for take in sources]
    takes = [
        _mend(_read(take, warnings.append), name or f"the {what}", warnings.append)
        for take, name in zip(sources, names, strict=True)
    ]
    wave, name = _add_up(takes), " + ".join(filter(None, names))
    highest = peak(wave)
    if _SILENT_PEAK <= highest < _QUIET_PEAK:
        gain = _RAISED_PEAK / highest
        wave = map_blocks(lambda block: block * gain, wave)
        level, more = 20 * math.log10(highest), 20 * math.log10(gain)
        warnings.append(
            f"the {what} is very quiet, with a peak of {level:.0f} dBFS; it was raised by {more:.0f} dB, its "
            "noise with it"
        )
    vocal = check_vocal(wave, name=name, what=what)
    return replace(vocal, warnings=(*warnings, *vocal.warnings))


def check_vocal(wave: Tensor, name: str, what: str = "vocal") -> Vocal:
    """wave [2, samples] at 48 kHz -> a vocal with a peak of at most 1; AudioError if it is unusable."""
    subject = name or f"the {what}"
    seconds = wave.shape[-1] / SAMPLE_RATE_HZ
    if wave.shape[-1] < SHORTEST_SECONDS * SAMPLE_RATE_HZ:
        raise AudioError(f"{subject} has {seconds:.3f} s; give a {what} of at least {SHORTEST_SECONDS:g} s")
    highest = peak(wave)
    if not math.isfinite(highest):
        raise AudioError(f"{subject} holds NaN or infinite samples; export it again from your audio editor")
    if highest < _SILENT_PEAK:
        raise AudioError(f"{subject} is silent; give a recording in which somebody sings")
    warnings = []
    if highest > 1:
        wave = map_blocks(lambda block: block / highest, wave)
        warnings.append(f"the {what}'s peak was {highest:.4g}, above full scale; it was turned down to 1")
    if highest < _QUIET_PEAK:
        warnings.append(f"the {what} is very quiet, and so is what is made of it; turn the recording up")
    return Vocal(wave=wave, name=name, warnings=tuple(warnings))


def _mend(wave: Tensor, subject: str, tell: Callable[[str], None]) -> Tensor:
    """Return a wave [2, samples] whose sides swing about 0, both sound and do not cancel each other out."""
    moments = torch.zeros(2, 3, dtype=torch.float64)  # of each side: sum; products with left and right
    for _, (block,) in blocks(wave):
        exact = block.double()
        moments += torch.cat([exact.sum(dim=1, keepdim=True), exact @ exact.T], dim=1)
    samples = max(1, wave.shape[-1])
    offset, products = moments[:, 0] / samples, moments[:, 1:] / samples
    if not bool(moments.isfinite().all()):
        return wave  # refused later
    products -= offset[:, None] * offset
    powers = products.diagonal().clamp_min(0)
    is_off = offset.abs() > _OFFSET * powers.sqrt() + _LEAST_OFFSET
    louder, sides = int(powers.argmax()), torch.eye(2)
    if bool(is_off.any()):
        tell(f"{subject} had an offset of {float(offset.abs().max()):.2g} of full scale; it was removed")
    if powers.max() < _NOTHING:
        tell(f"{subject} is silent")
    elif powers.min() < _SILENT_SIDE * powers.max():
        sides = sides[[louder, louder]]
        tell(f"one side of {subject} is silent; the other is heard and mixed on both")
    elif products[0, 1] < _CANCELLING * powers.prod().sqrt():
        sides[1, 1] = -1
        tell(f"the sides of {subject} cancel each other out; the right one was turned over")
    elif not bool(is_off.any()):
        return wave
    offset = (offset * is_off)[:, None].float()
    return map_blocks(lambda block: sides @ (block - offset), wave)


def _add_up(takes: Sequence[Tensor]) -> Tensor:
    """The sum of waves [2, n], as long as the longest."""
    if len(takes) == 1:
        return takes[0]
    total = new_wave(2, max(take.shape[-1] for take in takes))
    for take in takes:
        for _, (block, part) in blocks(total[:, : take.shape[-1]], take):
            block += part
    return total


def load_prefix(source: Source, vocal: Vocal, tell: Callable[[str], None] | None = None) -> Tensor:
    """The given start of the accompaniment, [1, 2, samples], cut to whole token frames by the caller.

    tell: see read_audio. Raises AudioError when it cannot be read or does not leave anything to generate.
    """
    wave = _read(source, tell)
    if not math.isfinite(peak(wave)):
        raise AudioError("the prefix holds NaN or infinite samples; export it again from your audio editor")
    if wave.shape[-1] >= vocal.wave.shape[-1]:
        seconds, song = (part.shape[-1] / SAMPLE_RATE_HZ for part in (wave, vocal.wave))
        raise AudioError(
            f"the prefix has {seconds:.2f} s, the vocal {song:.2f} s; give a prefix shorter than the song"
        )
    return wave[None]


def _read(source: Source, tell: Callable[[str], None] | None) -> Tensor:
    return _to_stereo(source) if isinstance(source, Tensor) else read_audio(source, tell=tell)


def _to_stereo(wave: Tensor) -> Tensor:
    wave = wave.detach().cpu().float()
    if wave.ndim == 1:
        wave = wave[None]
    if wave.ndim != 2 or wave.shape[0] > wave.shape[1]:
        raise AudioError(f"a wave must be [samples] or [channels, samples], got shape {tuple(wave.shape)}")
    return wave if wave.shape[0] == 2 else wave.mean(dim=0, keepdim=True).repeat(2, 1)


PEAK_LIMIT = 0.98  # largest sample magnitude that is written; 1.0 is full scale
_JOINT_SECONDS = 0.05  # of the cross-fade from a given start to what goes on from it
_LEVEL_SECONDS = 1.0  # of a given start's end that set the level of the rest
_FURTHEST_DB = 4.0  # that they may be away from what the whole start would set: they may be a rest
_LEVEL_TOLERANCE_DB = 1.0  # hardly anybody hears less
_FADE_SECONDS = 0.25  # about how long a played note takes to die away


def match_level(found: Tensor, reference: Tensor) -> Tensor:
    """found with the power of the reference, for codes do not know a recording's level; silence stays."""
    return found * (reference.square().mean() / found.square().mean().clamp_min(1e-12)).sqrt()


@dataclass(frozen=True, kw_only=True)
class Mixdown:
    """A vocal and an accompaniment brought together."""

    # [2, samples], levelled to fit under the vocal as it was given, faded at its end, peak <= PEAK_LIMIT
    accompaniment: Tensor
    mix: Tensor  # [2, samples], peak <= PEAK_LIMIT
    vocal_lufs: float
    accompaniment_lufs: float  # of `accompaniment`, before the fade
    mix_gain_db: float  # common gain of both tracks in the mix; 0 unless the sum would clip
    gain: float  # of `accompaniment` over the one that was given
    own_gain: float  # the part of it that holds its peak, which the band in the mix is without


def join_prefix(prefix: Tensor, band: Tensor) -> float:
    """Put a given start [2, k] in place of a band's own [2, samples], and the rest at its level; in place.

    Return the gain of the rest.
    The band was made to go on from the start, so both are as loud where they sound together: near the joint.
    There, the start's last samples, played backwards and faded out, hide the change.
    """
    length, gain = prefix.shape[-1], 1.0
    near, whole = (
        measure_loudness(prefix[:, start:]) - measure_loudness(band[:, start:length])
        for start in (max(0, length - round(_LEVEL_SECONDS * SAMPLE_RATE_HZ)), 0)
    )
    if math.isfinite(near) and math.isfinite(whole):
        change_db = whole + min(max(near - whole, -_FURTHEST_DB), _FURTHEST_DB)
        gain = 10 ** (change_db / 20)
        amplify(band, gain)
    fade = min(round(_JOINT_SECONDS * SAMPLE_RATE_HZ), length, band.shape[-1] - length)
    angles = (torch.arange(fade) + 0.5) / fade * (math.pi / 2)
    after = band[:, length : length + fade]
    after.copy_(prefix[:, length - fade :].flip(-1) * angles.cos() + after * angles.sin())
    band[:, :length] = prefix
    return gain


def mix_down(
    vocal: Tensor, accompaniment: Tensor, *, accompaniment_db: float | None, fade_seconds: float = 0.0
) -> Mixdown:
    """Set the accompaniment accompaniment_db above the vocal's loudness (None: as it is) and add both.

    vocal, accompaniment: [2, samples] at 48 kHz; accompaniment may be silent and is then left as it is.
    The accompaniment fades at its end, in a quarter of a second or longer, for that cuts its notes off.
    Peaks are held by gain alone, never by clipping: the mix by one gain for both tracks.
    """
    vocal_lufs = measure_loudness(vocal)
    level, gain_db = measure_loudness(accompaniment), 0.0
    if accompaniment_db is not None and math.isfinite(level) and math.isfinite(vocal_lufs):
        gain_db = vocal_lufs + accompaniment_db - level
        level += gain_db
    gain = 10 ** (gain_db / 20)
    accompaniment = map_blocks(lambda band: band * gain, accompaniment)
    _fade_end(accompaniment, find_fade(fade_seconds))
    mix = map_blocks(torch.add, vocal, accompaniment)
    mix_gain = _peak_gain(mix)
    own_gain = _peak_gain(accompaniment)
    return Mixdown(
        accompaniment=amplify(accompaniment, own_gain),
        mix=amplify(mix, mix_gain),
        vocal_lufs=vocal_lufs,
        accompaniment_lufs=level + 20 * math.log10(own_gain),
        mix_gain_db=20 * math.log10(mix_gain),
        gain=gain * own_gain,
        own_gain=own_gain,
    )


def warn_of_level(mixdown: Mixdown, asked_db: float | None) -> list[str]:
    """What to say where the limit of peaks keeps the accompaniment below the level that was asked for."""
    reached_db = mixdown.accompaniment_lufs - mixdown.vocal_lufs
    if asked_db is None or not -math.inf < reached_db < asked_db - _LEVEL_TOLERANCE_DB:
        return []
    gain_db = mixdown.mix_gain_db
    turned_down = f", with both turned down by {-gain_db:.1f} dB" if gain_db < 0 else ""
    return [
        f"the accompaniment is {reached_db:+.1f} LU against the vocal, not {asked_db:+.1f}: louder would "
        f"clip; in the mix it is as asked{turned_down}"
    ]


def find_fade(seconds: float) -> float:
    """How long the end fades that is to fade for these seconds; a note that is cut off needs some."""
    return max(seconds, _FADE_SECONDS)


def fall(samples: int) -> Tensor:
    """Weights [samples] that fall from 1 to 0 along half a cosine, the last one 0."""
    return (0.5 + 0.5 * torch.linspace(0, math.pi, samples + 1, dtype=torch.float64)[1:].cos()).float()


def level_parts(parts: Mapping[str, np.ndarray], lufs: float) -> dict[str, Tensor]:
    """Parts of a band, each [2, samples], under one gain: their sum gets a loudness, and fades at its end.

    The sum stays below full scale; silence stays as it is.
    """
    waves = {name: torch.from_numpy(wave) for name, wave in parts.items()}
    if not waves:
        return {}
    total = torch.stack(list(waves.values())).sum(dim=0)
    change_db = lufs - measure_loudness(total)
    gain = 10 ** (change_db / 20) if math.isfinite(change_db) else 1.0
    gain *= _peak_gain(total * gain)
    for wave in waves.values():
        _fade_end(wave, _FADE_SECONDS)
    return {name: wave * gain for name, wave in waves.items()}


def _fade_end(wave: Tensor, seconds: float) -> None:
    """Let the last seconds of wave [channels, samples] fall to nothing as in `fall`, in place."""
    samples = min(wave.shape[-1], round(seconds * SAMPLE_RATE_HZ))
    wave[:, wave.shape[-1] - samples :] *= fall(samples).to(wave)


def _peak_gain(wave: Tensor) -> float:
    highest = peak(wave)
    return min(1.0, PEAK_LIMIT / highest) if highest > 0 else 1.0
