"""Rank candidates by how well they fit the singer, read from codes alone, before anything is rendered.

The read-outs of both tracks' codes say what is sung and what is played; the harmony reader turns the band's
chroma into chords and keys; the language model says, as a by-product of sampling, how much likelier the vocal
made the codes. One score of all of it orders the candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.chroma import (
    BLOCK_RATE_HZ,
    CHROMA_RATE_HZ,
    at_chroma_rate,
    average_blocks,
    estimate_activity,
    mel_power,
)
from duotok.tokenizer.music.harmony import HarmonyReader, default_reader
from duotok.tokenizer.music.labels import CHORDS, NO_CHORD
from duotok.tokenizer.music.pitch import measure_coherence

# What each part of Fit adds to the score. Chosen on PopBand's validation songs, 8 candidates of 20 s each,
# so that the best of 4 gains in-key share, harmony (both by the notes that are truly sung) and the right key
# at once. Two parts did not vary there and are set by judgement: a tenth of the singing left alone weighs as
# much as 5 % of it out of key. The language model's information gained nothing there and so weighs little.
WEIGHTS = {
    "in_key": 1.0,
    "harmony_bits": 0.2,
    "key_agreement": 0.15,
    "chord_bits": 0.1,
    "information_bits": 0.1,
    "support": 0.5,
    "noise": -0.5,
    "pulse_bits": 0.1,  # chosen on the same songs, 24 times four candidates in different styles
    "joint_bits": 0.5,  # by judgement: a tenth of a bit in each code that follows is as 5 % out of key
}
_MEL_RATE_HZ = 100.0
# How often each pitch class above a chord's root is sung over major and minor triads: shares of time in the
# melodies of POP909's songs 001-818, by their chord labels.
_SUNG_OVER_MAJOR = (0.206, 0.001, 0.089, 0.008, 0.235, 0.046, 0.009, 0.269, 0.005, 0.079, 0.019, 0.034)
_SUNG_OVER_MINOR = (0.337, 0.003, 0.058, 0.238, 0.001, 0.063, 0.001, 0.163, 0.021, 0.008, 0.104, 0.002)
_UNEXPLAINED = 0.1  # share of sung notes that follow no chord, so that a single wrong note is not all
_LEAST_HARMONY = 0.05  # harmony of silence is 0, which has no logarithm
_LONG_SILENCE_SECONDS = 1.0
_LEAST_BEATS, _PULSE_FRAMES = 4, 3  # 30 ms to both sides of a beat


@dataclass(frozen=True, kw_only=True)
class TrackReading:
    """What the codes of one track say, in blocks of 0.1 s."""

    chroma: Tensor  # [blocks, 12] amplitudes, C first; zero where nothing sounds
    power: Tensor  # [blocks] summed mel power
    chords: Tensor  # [blocks, 25] probabilities
    scales: Tensor | None  # [12] probabilities of the major scales with their relative minors; None: silent

    @property
    def sounding(self) -> Tensor:
        """Which blocks sound [blocks] bool."""
        return self.chroma.amax(dim=1) > 0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one candidate fits the vocal; None where it cannot be told."""

    in_key: float | None  # share of the singing inside the key of the accompaniment's chroma, 0 to 1
    harmony_bits: float | None  # log2 of the chroma energy's share at the sung pitch class x 12; 0 = chance
    key_agreement: float | None  # probability that both tracks are in the same or the relative key
    chord_bits: float | None  # mean log2 of: probability of the sung pitch class over the chords / by chance
    support: float  # share of the singing that is not left alone in a long silence of the band
    noise: float  # share of the singer's pauses with a loud band that plays no chord
    information_bits: float | None  # what the vocal told the language model about each code
    likelihood_bits: float | None  # mean log2 probability of a code, given the vocal
    # log2 of how much begins on the beats of the plan, over what begins at any time.
    pulse_bits: float | None = None
    # Of a stretch: the same of the codes that follow on it and stay as they are.
    joint_bits: float | None = None

    @property
    def score(self) -> float:
        """What candidates are ranked by, higher is better."""
        parts = asdict(self)
        return sum(weight * (parts[name] or 0.0) for name, weight in WEIGHTS.items())

    def describe(self) -> dict[str, float | None]:
        """The score and its parts, for report.json."""
        parts = {name: None if value is None else round(value, 4) for name, value in asdict(self).items()}
        if self.joint_bits is None:
            del parts["joint_bits"]
        return {"score": round(self.score, 4), **parts}


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One candidate before it is sound."""

    seed: int
    codes: Tensor  # [frames] accompaniment codes at 25 Hz
    told: ReadOut  # what they say, a batch of one on the CPU
    fit: Fit  # to the vocal
    style: str | None = None  # None of a model that knows none
    sheet: Tensor | None = None  # [frames, COLUMNS] that it was played from


def rank(fits: Sequence[Fit], styles: Sequence[str | None] = (), kept: int = 1) -> list[int]:
    """The candidates' numbers, best first; equal ones in their order.

    Before the others come `kept` that are of different styles, as far as these go.
    """
    order = sorted(range(len(fits)), key=lambda number: -fits[number].score)
    if not styles:
        return order
    first = {styles[number]: number for number in reversed(order)}  # the best of each style
    chosen = set(sorted(order, key=lambda number: first[styles[number]] != number)[:kept])
    return sorted(order, key=lambda number: number not in chosen)


@torch.no_grad()
def read_track(told: ReadOut, track: str, reader: HarmonyReader | None = None) -> TrackReading:
    """Read a track's music from what its codes say (a batch of one); reader: None takes the shipped one."""
    reader = reader or default_reader()
    active = at_chroma_rate(estimate_activity(told.mel[0]))
    chroma = average_blocks(told.chroma[0].cpu().double().numpy(), CHROMA_RATE_HZ)
    blocks = torch.from_numpy(chroma).float()
    sounding = torch.from_numpy(average_blocks(active, CHROMA_RATE_HZ) >= 0.5)
    power = mel_power(told.mel[0]).numpy()
    silent = torch.zeros(CHORDS)
    silent[NO_CHORD] = 1.0
    scales = None
    if sounding.any():
        keys = reader.key_logits(reader.key_evidence(blocks[sounding], track)[None], track)[0].softmax(dim=0)
        scales = keys[:12] + keys[12:].roll(3)  # A minor (9) has the scale of C major (0)
    return TrackReading(
        chroma=blocks * sounding[:, None],
        power=torch.from_numpy(average_blocks(power, _MEL_RATE_HZ)).float(),
        chords=torch.where(sounding[:, None], reader.judge(blocks).exp(), silent),
        scales=scales,
    )


def measure_fit(
    vocal: TrackReading,
    accompaniment: TrackReading,
    *,
    pulse_bits: float | None = None,
    likelihood_nats: float | None = None,
    information_nats: float | None = None,
    joint_nats: float | None = None,
) -> Fit:
    """How one accompaniment fits; likelihoods as `duotok.lm.contract` has them."""
    blocks = min(len(vocal.chroma), len(accompaniment.chroma))
    sung, band = vocal.sounding[:blocks], accompaniment.sounding[:blocks]
    classes = vocal.chroma[:blocks].argmax(dim=1)
    pitches = torch.where(sung, classes.double(), torch.nan).numpy()
    coherence = measure_coherence(accompaniment.chroma[:blocks].double().numpy(), pitches)
    harmony, chord_bits, key_agreement, support = coherence.harmony, None, None, 1.0
    if sung.any():
        expected = accompaniment.chords[:blocks][sung] @ sung_over_chords()
        chord_bits = float((12 * expected.gather(1, classes[sung, None])).log2().mean())
        support = 1.0 - float(_long_runs(~band)[sung].float().mean())
    if vocal.scales is not None and accompaniment.scales is not None:
        key_agreement = float(vocal.scales @ accompaniment.scales)
    return Fit(
        in_key=coherence.in_key,
        harmony_bits=None if harmony is None else math.log2(max(harmony, _LEAST_HARMONY)),
        key_agreement=key_agreement,
        chord_bits=chord_bits,
        support=support,
        noise=_measure_noise(sung, accompaniment),
        information_bits=_bits(information_nats),
        likelihood_bits=_bits(likelihood_nats),
        pulse_bits=pulse_bits,
        joint_bits=_bits(joint_nats),
    )


def measure_pulse(mel: Tensor, beats_seconds: np.ndarray) -> float | None:
    """Return log2 of the flux of mel [frames, bands] on beats [beats], each within 30 ms, over its mean.

    None of a band that plays nothing new, and with fewer than four beats.
    """
    rises = functional.relu(mel.double().cpu().diff(dim=0)).sum(dim=1)
    if len(beats_seconds) < _LEAST_BEATS or float(rises.mean()) < 1e-6:
        return None
    flux = functional.avg_pool1d(rises[None], 3, stride=1, padding=1)
    near = functional.max_pool1d(flux, 2 * _PULSE_FRAMES + 1, stride=1, padding=_PULSE_FRAMES)[0]
    # The rise into a frame stands one before it.
    places = torch.from_numpy(np.round(beats_seconds * _MEL_RATE_HZ).astype(int) - 1).clamp(0, len(near) - 1)
    return math.log2(max(float(near[places].mean() / flux.mean()), _LEAST_HARMONY))


def sung_over_chords() -> Tensor:
    """Probability of each sung pitch class over each chord [25, 12]; over no chord all are alike."""
    rows = [np.roll(shape, root) for shape in (_SUNG_OVER_MAJOR, _SUNG_OVER_MINOR) for root in range(12)]
    table = torch.tensor(np.array([*rows, np.full(12, 1 / 12)]), dtype=torch.float32)
    return (1 - _UNEXPLAINED) * table / table.sum(dim=1, keepdim=True) + _UNEXPLAINED / 12


def _long_runs(flags: Tensor) -> Tensor:
    """Where flags [blocks] are set for a long stretch at once: [blocks] bool."""
    shortest = round(_LONG_SILENCE_SECONDS * BLOCK_RATE_HZ)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.numpy().astype(np.int8), [0]])))
    runs = torch.zeros_like(flags)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        runs[begin:end] = bool(end - begin >= shortest)
    return runs


def _measure_noise(sung: Tensor, accompaniment: TrackReading) -> float:
    """Share of the singer's pauses in which the band is louder than under the singing and plays no chord."""
    band, power = accompaniment.sounding[: len(sung)], accompaniment.power[: len(sung)]
    if sung.all() or not (sung & band).any():
        return 0.0
    loud = band & (power > power[sung & band].mean())
    return float((loud * accompaniment.chords[: len(sung), NO_CHORD])[~sung].mean())


def _bits(nats: float | None) -> float | None:
    return None if nats is None else nats / math.log(2)
