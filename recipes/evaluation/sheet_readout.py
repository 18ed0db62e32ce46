"""How well the bars and chords that a vocal asks for are read out of its codes, against the written score."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm

from duotok.lm.sheet.columns import CHORD, UNKNOWN, write_sheet
from duotok.lm.sheet.reader import SheetReader
from duotok.lm.sheet.tracking import places_between
from duotok.recipes.evaluation.excerpts import Excerpt
from duotok.recipes.lm.sheets import agree, label_frames, measure_agreement
from duotok.tokenizer.model import DuoTokenizer

_GUESSED_BAR_SECONDS = 2.4  # four beats at 100 per minute


def measure_sheets(
    reader: SheetReader, tokenizer: DuoTokenizer, excerpts: Sequence[Excerpt]
) -> dict[str, float]:
    """Agreement of the read sheets, and (_constant) of steady bars and these songs' commonest chord."""
    songs = []
    for excerpt in tqdm(excerpts, desc="readouts, lead sheet", disable=None):
        codes = tokenizer.encode(excerpt.read("vocal")[None], "vocal")[0]
        written = label_frames(excerpt.item, tokenizer.frame_rate_hz)[: len(codes)]
        songs.append((codes[: len(written)], written))
    figures = {f"sheet_{name}": value for name, value in measure_agreement(reader, songs).items()}
    guessed = agree((_guess(songs, tokenizer.frame_rate_hz, len(codes)), written) for codes, written in songs)
    return figures | {f"sheet_{name}_constant": value for name, value in guessed.items()}


def _guess(songs: Sequence[tuple[Tensor, Tensor]], rate_hz: float, frames: int) -> Tensor:
    known = (chord for _, written in songs for chord in written[:, CHORD].tolist() if chord != UNKNOWN)
    bar = _GUESSED_BAR_SECONDS * rate_hz
    places = places_between(np.arange(0, frames + 2 * bar, bar), frames)
    return write_sheet(places, np.full(frames, Counter(known).most_common(1)[0][0]))
