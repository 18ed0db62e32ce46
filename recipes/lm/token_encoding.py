"""Codes of corpus items, in this process or in several; an item that cannot be encoded has a reason instead.

Heavy imports wait until something is encoded, so that the command's --help does not.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.errors import DuoTokError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from duotok.recipes.corpus.manifest import Item
    from duotok.tokenizer.model import DuoTokenizer

READ_AHEAD = 2  # batches of audio read while one is encoded
# What one damaged or odd item can raise, torch's errors on shapes and memory among them.
ITEM_ERRORS = (DuoTokError, RuntimeError, ValueError, OSError)

_tokenizer: "DuoTokenizer | None" = None  # one per worker process


def read_waves(items: "Sequence[Item]") -> "dict[str, list[Tensor]]":
    """Return the mono waves of a batch of items, by track."""
    from duotok.lm.dual_track.layout import TRACKS

    return {track: [item.read(track).mean(dim=0, keepdim=True) for item in items] for track in TRACKS}


def encode_waves(waves: "list[Tensor]", track: str, tokenizer: "DuoTokenizer") -> "list[Tensor]":
    """Return codes [frames] of waves [1, samples]; equally long waves are encoded side by side."""
    import torch

    device = next(tokenizer.parameters()).device
    groups: dict[int, list[int]] = {}
    for number, wave in enumerate(waves):
        groups.setdefault(wave.shape[1], []).append(number)
    codes: dict[int, Tensor] = {}
    for numbers in groups.values():
        batch = tokenizer.encode(torch.stack([waves[n] for n in numbers]).to(device), track).cpu()
        codes.update(zip(numbers, batch, strict=True))
    return [codes[number] for number in range(len(waves))]


def read_items(items: "Sequence[Item]") -> "list[dict[str, Tensor] | str]":
    """Return each item's waves by track, or the reason why it cannot be read."""
    found: list[dict[str, Tensor] | str] = []
    for item in items:
        try:
            found.append({track: waves[0] for track, waves in read_waves([item]).items()})
        except ITEM_ERRORS as error:
            found.append(_reason(error))
    return found


def encode_items(
    waves: "Sequence[dict[str, Tensor] | str]", tokenizer: "DuoTokenizer"
) -> "list[dict[str, np.ndarray] | str]":
    """Return each item's codes [frames] int32 by track, or the reason why there are none."""
    import torch

    from duotok.lm.dual_track.layout import TRACKS

    found: list[dict[str, np.ndarray] | str] = [each if isinstance(each, str) else "" for each in waves]
    readable = [(number, each) for number, each in enumerate(waves) if not isinstance(each, str)]
    try:
        with torch.inference_mode():
            codes = {t: encode_waves([each[t] for _, each in readable], t, tokenizer) for t in TRACKS}
    except ITEM_ERRORS as error:
        if len(readable) == 1:
            found[readable[0][0]] = _reason(error)
        else:  # one of them is at fault: each goes alone
            for number, each in readable:
                found[number] = encode_items([each], tokenizer)[0]
        return found
    for place, (number, _) in enumerate(readable):
        pair = {track: codes[track][place].int().numpy() for track in TRACKS}
        lengths = [len(rows) for rows in pair.values()]
        is_whole = lengths[0] == lengths[1] > 0
        found[number] = pair if is_whole else f"the tracks have {lengths[0]} and {lengths[1]} frames"
    return found


def encode_here(
    batches: "Sequence[list[Item]]", tokenizer: "DuoTokenizer"
) -> "Iterator[tuple[list[Item], list[dict[str, np.ndarray] | str]]]":
    """Yield every batch with what `encode_items` gives, reading ahead in threads."""
    with ThreadPoolExecutor(max_workers=READ_AHEAD) as pool:
        waiting = [pool.submit(read_items, batch) for batch in batches[:READ_AHEAD]]
        for number, batch in enumerate(batches):
            waves = waiting.pop(0).result()
            if number + READ_AHEAD < len(batches):
                waiting.append(pool.submit(read_items, batches[number + READ_AHEAD]))
            yield batch, encode_items(waves, tokenizer)


def encode_in_processes(
    batches: "Iterable[list[Item]]", folder: Path, *, device: str, workers: int, threads: int
) -> "Iterator[tuple[list[Item], list[dict[str, np.ndarray] | str]]]":
    """Yield the same, in the same order, from processes that each read the tokenizer's folder.

    Where a process dies, each item of its batch is tried again alone: those come last.
    """
    from duotok.recipes.corpus.worker_pool import run_all

    arguments = (folder, device, threads)
    suspects: list[list[Item]] = []
    for batch, found in run_all(
        batches, _encode_batch, workers=workers, start=_start_worker, arguments=arguments
    ):
        if not isinstance(found, str):
            yield batch, found
        elif len(batch) == 1:
            yield batch, [found]
        else:
            suspects += [[item] for item in batch]
    for batch, found in run_all(
        suspects, _encode_batch, workers=workers, start=_start_worker, arguments=arguments
    ):
        yield batch, [found] if isinstance(found, str) else found


def _start_worker(folder: Path, device: str, threads: int) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: the parent does the writing
    import torch

    from duotok.tokenizer.model import DuoTokenizer

    torch.set_num_threads(threads)
    _tokenizer = DuoTokenizer.from_pretrained(folder).to(device)


def _encode_batch(batch: "list[Item]") -> "list[dict[str, np.ndarray] | str]":
    assert _tokenizer is not None
    return encode_items(read_items(batch), _tokenizer)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, DuoTokError) else f"{type(error).__name__}: {text}"
