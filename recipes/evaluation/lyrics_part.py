"""Token error rate of the lyrics that the vocal's codes stand for (P 3.2: lyric alignment)."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from duotok.recipes.evaluation.excerpts import Settings, choose_excerpts, read_items
from duotok.tokenizer.model import DuoTokenizer

_ITEMS, _SECONDS = 49, 20.0


def measure_lyrics(settings: Settings) -> dict[str, float]:
    """Edit distance over reference tokens on sung excerpts, in all and for voices by name.

    Returns nothing for a tokenizer without lyric head. Saying nothing costs 1.
    """
    items = read_items(settings)
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    vocabulary = tokenizer.text
    if vocabulary is None:
        return {}
    excerpts = choose_excerpts(
        items,
        count=settings.items or _ITEMS,
        seconds=settings.seconds or _SECONDS,
        seed=settings.seed,
    )
    errors: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {}
    for excerpt in tqdm(excerpts, desc="lyrics", disable=None):
        start = excerpt.start_seconds
        wanted = vocabulary.encode(excerpt.item.text_between(start, start + excerpt.seconds))
        if not wanted:
            continue
        codes = tokenizer.encode(excerpt.read("vocal")[None], "vocal")
        found = vocabulary.encode(tokenizer.read_text(codes, "vocal")[0])
        errors.setdefault(excerpt.item.voice, []).append(edit_distance(found, wanted))
        lengths.setdefault(excerpt.item.voice, []).append(len(wanted))
    total = sum(sum(counts) for counts in lengths.values())
    if total == 0:
        return {}
    rates = {voice: sum(errors[voice]) / sum(lengths[voice]) for voice in sorted(errors)}
    return {
        "token_error_rate": sum(sum(counts) for counts in errors.values()) / total,
        "token_error_rate_worst_voice": float(np.max(list(rates.values()))),
        "tokens": total,
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
