"""The stems and the mix of one song on disk at 48 kHz while it is cut: made in blocks, read in stretches."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.corpus.song_files import SongFile
from duotok.recipes.corpus.voice_activity import frame_levels, loud_level
from duotok.recipes.separation.stems import Separator
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, stream_audio
from duotok.tokenizer.common.errors import AudioError
from duotok.tokenizer.heads import STEMS

PARTS = (*STEMS, "mix")
BLOCK_SECONDS = 30
OVERLAP_SECONDS = 2  # of neighbouring blocks in the separator, cross-faded
HEADROOM = 0.5  # files hold half the amplitude, so that stems above full scale do not clip
SILENT_PEAK = 1e-4
MOST_UNEQUAL_SECONDS = 1.0  # by which stems may differ in length from their mix


class SongStems:
    """The five files of one song in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = 0
        self.mix_db = 0.0  # level of the loud parts of the mix

    @property
    def seconds(self) -> float:
        """Length of the song."""
        return self.samples / SAMPLE_RATE_HZ

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self.folder / f"{part}.w64"  # no limit of 4 GB

    def read(self, start: float, end: float) -> Tensor:
        """A stretch between two times in seconds as [5, 2, samples]: vocal, drums, bass, other, mix."""
        first, last = round(start * SAMPLE_RATE_HZ), round(end * SAMPLE_RATE_HZ)
        waves = []
        for part in PARTS:
            data, _ = soundfile.read(
                str(self.path(part)),
                start=first,
                stop=min(last, self.samples),
                dtype="float32",
                always_2d=True,
            )
            waves.append(torch.from_numpy(data.T / HEADROOM))
        return torch.stack(waves)

    def blocks(self, part: str) -> Iterator[Tensor]:
        """The whole of a part in blocks [2, samples]."""
        return (wave / HEADROOM for wave in stream_audio(self.path(part), BLOCK_SECONDS * SAMPLE_RATE_HZ))


def make_stems(song: SongFile, folder: Path, separator: Callable[[], Separator]) -> SongStems:
    """Write the stems of a song into a folder: those given next to it, else those of the separator.

    Raises AudioError when the recording is unreadable, empty or silent, or when its stems do not fit it.
    """
    stems = SongStems(folder)
    blocks = _given_blocks(song) if song.stems else _separated_blocks(song, separator())
    levels, peak = [np.zeros(0)], 0.0
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(
                soundfile.SoundFile(str(stems.path(part)), "w", SAMPLE_RATE_HZ, 2, "PCM_16", format="W64")
            )
            for part in PARTS
        }
        for block in blocks:
            peak = max(peak, float(block[-1].abs().max()) if block.shape[-1] else 0.0)
            levels.append(frame_levels(block[-1]))
            stems.samples += block.shape[-1]
            for part, wave in zip(PARTS, block, strict=True):
                files[part].write((wave * HEADROOM).numpy().T)
    if peak < SILENT_PEAK:
        raise AudioError(f"{song.mix or song.name} is silent")
    stems.mix_db = loud_level(np.concatenate(levels))
    return stems


def _separated_blocks(song: SongFile, separator: Separator) -> Iterator[Tensor]:
    """[5, 2, samples] per block; neighbouring blocks overlap in the separator and are cross-faded."""
    assert song.mix is not None
    overlap = OVERLAP_SECONDS * SAMPLE_RATE_HZ
    rise = (torch.arange(overlap) + 0.5) / overlap
    before, held = torch.zeros(2, 0), torch.zeros(len(STEMS), 2, 0)
    for wave in stream_audio(song.mix, BLOCK_SECONDS * SAMPLE_RATE_HZ):
        window = torch.cat([before, wave], dim=1)
        separated = separator.separate(window)
        stems = torch.stack([separated[stem] for stem in STEMS])
        shared = held.shape[-1]
        stems[..., :shared] = held * rise.flip(0)[:shared] + stems[..., :shared] * rise[:shared]
        yield _with_mix(stems[..., :-overlap])
        before, held = window[:, -overlap:], stems[..., -overlap:]
    yield _with_mix(held)


def _given_blocks(song: SongFile) -> Iterator[Tensor]:
    """[5, 2, samples] per block from the files next to a song; a mix that is not there is their sum."""
    paths = {**song.stems, **({"mix": song.mix} if song.mix is not None else {})}
    streams = {part: stream_audio(path, BLOCK_SECONDS * SAMPLE_RATE_HZ) for part, path in paths.items()}
    totals = dict.fromkeys(paths, 0)
    while True:
        waves = {part: next(stream, torch.zeros(2, 0)) for part, stream in streams.items()}
        length = max(wave.shape[-1] for wave in waves.values())
        if length == 0:
            break
        for part, wave in waves.items():
            totals[part] += wave.shape[-1]
        if max(totals.values()) - min(totals.values()) > MOST_UNEQUAL_SECONDS * SAMPLE_RATE_HZ:
            shown = ", ".join(f"{part} {total / SAMPLE_RATE_HZ:.1f} s" for part, total in totals.items())
            raise AudioError(f"the stems of {song.name} do not have one length: {shown}")
        padded = {part: functional.pad(wave, (0, length - wave.shape[-1])) for part, wave in waves.items()}
        silence = torch.zeros(2, length)
        stems = torch.stack([padded.get(stem, silence) for stem in STEMS])
        yield torch.cat([stems, padded["mix"][None]]) if "mix" in padded else _with_mix(stems)


def _with_mix(stems: Tensor) -> Tensor:
    return torch.cat([stems, stems.sum(dim=0, keepdim=True)])
