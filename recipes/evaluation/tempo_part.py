"""Figures of ten made-up melodies, 60 to 180 BPM: whether their tempo is felt, or half or double named."""

import numpy as np
import torch
from tqdm import tqdm

from duotok.recipes.accompany.bundle import load_bundle
from duotok.recipes.accompany.wishes import SheetWishes, make_plan
from duotok.recipes.corpus.popband.singing import Manner, sing
from duotok.recipes.corpus.popband.voicebank import load_bank
from duotok.recipes.corpus.scores.song import Note
from duotok.recipes.evaluation.excerpts import Settings
from duotok.recipes.evaluation.whole_part import is_near
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.pitch import sung_pitch

TEMPI_BPM = (60, 70, 80, 90, 100, 112, 126, 140, 160, 180)
IN_EIGHTHS_BPM = 70  # sung in eighths throughout
_BARS, _FIRST_SECONDS = 16, 1.0
_RHYTHMS = ((1, 1, 1, 1), (1, 0.5, 0.5, 2), (1.5, 0.5, 1, 1), (1, 1, 0.5, 0.5, 1), (2, 1, 1))
_EIGHTHS, _CADENCE = (0.5,) * 8, (1, 2)  # a phrase of four bars ends in a rest
_CHORDS = ((0, 2, 4), (4, 6, 8), (5, 7, 9), (3, 5, 7))  # steps of the scale: I V vi IV, a bar each
_SCALE = np.array([0, 2, 4, 5, 7, 9, 11])


def make_melody(tempo_bpm: float, low: int) -> tuple[Note, ...]:
    """Sixteen bars in the major key of MIDI pitch `low`, the first after a second; always the same."""
    rng, beat = np.random.default_rng(round(tempo_bpm)), 60 / tempo_bpm
    lines = [_RHYTHMS[rng.integers(len(_RHYTHMS))] for _ in range(3)]
    notes: list[Note] = []
    for bar in range(_BARS):
        lengths = _CADENCE if bar % 4 == 3 else _EIGHTHS if tempo_bpm == IN_EIGHTHS_BPM else lines[bar % 4]
        at = 4.0 * bar
        for number, length in enumerate(lengths):
            step = int(rng.choice(_CHORDS[bar % 4])) if number % 2 == 0 else int(rng.integers(0, 9))
            pitch = low + int(_SCALE[step % 7]) + 12 * (step // 7)
            start, end = (_FIRST_SECONDS + beat * time for time in (at, at + 0.95 * length))
            notes.append(Note(start=start, end=end, pitch=pitch, velocity=90))
            at += length
    return tuple(notes)


@torch.no_grad()
def measure_tempo(settings: Settings) -> dict[str, float]:
    """Shares of the melodies, sung by the corpus' voice banks in turn, read at their tempo within 4 %.

    named: at their tempo, or at half or double of it, with the true one named beside. Raises DataError
    without banks.
    """
    paths = sorted((settings.corpus / "voices").glob("*.npz"))
    if not paths:
        raise DataError(
            f"{settings.corpus}/voices has no voice bank; make the corpus by recipes.corpus.popband"
        )
    bundle, right, named = load_bundle(settings.bundle), [], []
    for number, tempo_bpm in enumerate(tqdm(TEMPI_BPM, desc="tempo: melodies", disable=None)):
        bank, rng = load_bank(paths[number % len(paths)]), np.random.default_rng(settings.seed + number)
        melody = make_melody(tempo_bpm, 57)
        wave, _ = sing(melody, bank, Manner(), melody[-1].end + 1, rng)
        both = torch.from_numpy(wave).expand(2, -1)
        codes = bundle.tokenizer.encode(both[None], "vocal")[0]
        plan = make_plan(bundle.lm, codes, sung_pitch(both), bundle.tokenizer.frame_rate_hz, SheetWishes())
        if plan is None:
            return {}
        other = plan.other_tempo[0] if plan.other_tempo is not None else None
        right.append(is_near(plan.time_line.tempo_bpm, tempo_bpm))
        named.append(max(right[-1], is_near(other, tempo_bpm)))
        print(f"{tempo_bpm} BPM: read {plan.time_line.tempo_bpm:.1f}, or {other:.1f}" if other else "")
    return {"melodies": len(right), "right": float(np.mean(right)), "named": float(np.mean(named))}
