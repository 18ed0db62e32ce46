"""How well a lead sheet that was read agrees with the written one."""

from collections.abc import Iterable

from torch import Tensor

from duotok.lm.sheet.columns import CHORD, PLACE, PLACES, UNKNOWN
from duotok.lm.sheet.reader import SheetReader

_NEAR = 1  # parts of a bar that a place may be off: 0.1 s in a bar of 2 s


def measure_agreement(reader: SheetReader, songs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What `agree` says of what is read out of (vocal codes [frames], written sheet [frames, COLUMNS])."""
    return agree((reader.read(codes[None].long())[0], written) for codes, written in songs)


def agree(sheets: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Shares of frames, means over songs of (sheet, written sheet), each [frames, COLUMNS].

    bar: within one sixteenth part of the right place in the bar (0.19 by chance); chord: the right chord.
    Frames of which the written sheet does not know it do not count.
    """
    shares: dict[str, list[float]] = {"bar": [], "chord": []}
    for found, written in sheets:
        apart = (found[:, PLACE] - written[:, PLACE] + _NEAR) % PLACES
        for name, agrees, known in (
            ("bar", apart <= 2 * _NEAR, written[:, PLACE] != UNKNOWN),
            ("chord", found[:, CHORD] == written[:, CHORD], written[:, CHORD] != UNKNOWN),
        ):
            if known.any():
                shares[name].append(float(agrees[known].float().mean()))
    return {f"{name}_agreement": sum(each) / len(each) for name, each in shares.items() if each}
