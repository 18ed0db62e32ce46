"""A person's recordings to token pairs: separated where needed, checked, tokenized, kept song by song.

WORK/tokens holds the token shards, WORK/songs what came of every song; a run reads them to go on where
another one stopped. A song that cannot be used is left out with its reason, the rest goes on.
"""

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.dual_track.layout import TRACKS
from duotok.recipes.corpus.manifest import ACCOMPANIMENT_STEMS
from duotok.recipes.corpus.songs.maker import SongRecord, check_settings, read_record, write_record
from duotok.recipes.corpus.songs.recordings import PARTS, SongFile, SongStems, make_stems
from duotok.recipes.corpus.songs.segments import (
    FLOOR_DB,
    HarmonicDetector,
    Spans,
    frame_levels,
    join_spans,
    loud_level,
)
from duotok.recipes.finetuning.finetune_settings import SHORTEST_SECONDS
from duotok.recipes.lm.tokenize import open_index
from duotok.recipes.lm.tokens import TokenSong, append_shard
from duotok.recipes.separation.stems import Separator
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.model import DuoTokenizer

PART_SECONDS = 300.0  # longer recordings are tokenized in equal parts of at most this length
LEAST_SUNG_SHARE = 0.05  # of a song
# Where a separated voice is further below the mix, in the median of its stretches, it is the band's leak: of
# eight PopBand test songs through the shipped separator this leaves out none, and six of their eight bands.
SEPARATED_BELOW_MIX_DB = 12.0
MOST_BELOW_MIX_DB = 30.0  # an accompaniment further below the mix is none
GATE_MARGIN_SECONDS = 0.5  # of separated voice kept on both sides of the singing
GATE_FADE_SECONDS = 0.1
LEAST_FREE_BYTES = 1_000_000_000
UNFINISHED = ".work"  # below WORK: the stems of the song in work


@dataclass(frozen=True, kw_only=True)
class Listened:
    """What is known of the songs now."""

    tokens: Path  # folder of the token shards
    parts: list[TokenSong]  # of the usable songs, in the order of their names
    left_out: list[SongRecord]  # each with its reason


class SongListener:
    """Turns one recording after the other into codes."""

    def __init__(
        self, tokenizer: DuoTokenizer, separator: Callable[[], Separator], device: torch.device
    ) -> None:
        """separator: opens the separator; called when the first mix needs it."""
        self.tokenizer, self._device = tokenizer.to(device), device
        self._open_separator, self._separator = separator, None
        self._detector = HarmonicDetector()

    def listen(self, song: SongFile, work: Path) -> list[dict[str, Tensor]]:
        """Return {track: codes [frames]} of each part of a song; raises DuoTokError where it has no use."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            stems = make_stems(song, work, self.separator)
            if stems.seconds < SHORTEST_SECONDS:
                raise DataError(f"it lasts {stems.seconds:.1f} s, {SHORTEST_SECONDS:g} s are needed")
            voice = self._detector.find(stems.blocks("vocal"), stems.mix_db)
            sung = sum(end - start for start, end in voice) / stems.seconds
            if sung < LEAST_SUNG_SHARE:
                raise DataError(
                    f"singing is heard in {100 * sung:.0f} % of it, {100 * LEAST_SUNG_SHARE:.0f} % are needed"
                )
            if not song.stems and (below_db := voice_below_mix(stems, voice)) > SEPARATED_BELOW_MIX_DB:
                raise DataError(
                    f"nobody seems to sing in it: what was separated as the voice is {below_db:.0f} dB below "
                    f"the mix, {SEPARATED_BELOW_MIX_DB:g} dB are the most; if somebody does, give vocal and "
                    f"band apart"
                )
            _require_accompaniment(stems)
            parts = math.ceil(stems.seconds / PART_SECONDS - 1e-9)
            step = stems.seconds / parts
            bounds = [(number * step, (number + 1) * step) for number in range(parts)]
            return [self._encode(stems, start, end, None if song.stems else voice) for start, end in bounds]
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def separator(self) -> Separator:
        """The separator, opened once."""
        if self._separator is None:
            self._separator = self._open_separator()
        return self._separator

    def _encode(self, stems: SongStems, start: float, end: float, voice: Spans | None) -> dict[str, Tensor]:
        waves = dict(zip(PARTS, stems.read(start, end), strict=True))
        vocal = waves["vocal"]
        accompaniment = torch.stack([waves[stem] for stem in ACCOMPANIMENT_STEMS]).sum(dim=0)
        if voice is not None:
            # Where nobody sings, what the separator left in the vocal is band: it must not tell the model
            # what the band plays, as no clean vocal will.
            gate = sung_gate(voice, start, vocal.shape[-1])
            accompaniment = accompaniment + vocal * (1 - gate)
            vocal = vocal * gate
        pair = {"vocal": vocal, "accompaniment": accompaniment}
        mono = {track: pair[track].mean(dim=0, keepdim=True)[None].to(self._device) for track in TRACKS}
        return {track: self.tokenizer.encode(mono[track], track)[0].cpu() for track in TRACKS}


def listen_to_songs(
    songs: Sequence[SongFile], work: Path, listener: SongListener, *, separator_name: str
) -> Listened:
    """Tokenize the songs that WORK does not know yet, and return all of them.

    separator_name: which separator with which weights, so that a later run with another one is refused.
    """
    tokens = work / "tokens"
    check_settings(work, {"tokenizer": listener.tokenizer.fingerprint, "separator": separator_name})
    index = open_index(tokens, listener.tokenizer)
    pending = [song for song in songs if read_record(work, song) is None]
    if any(not song.stems for song in pending):
        listener.separator()  # a missing one ends the run at once
    with tqdm(total=len(songs), initial=len(songs) - len(pending), unit="song", desc="listening") as progress:
        for song in pending:
            if shutil.disk_usage(work).free < LEAST_FREE_BYTES:
                raise DataError(f"less than 1 GB is free in {work}; make room and run the same command again")
            index.songs = [part for part in index.songs if not _is_of(part, song)]  # of a changed recording
            reason = ""
            try:
                parts = listener.listen(song, work / UNFINISHED / song.key)
                pairs = {
                    f"{song.key}-{number:03d}": (song.name, "train", part)
                    for number, part in enumerate(parts)
                }
                append_shard(tokens, index, pairs)
            except DuoTokError as error:
                reason = str(error)
                progress.write(f"{song.name}: left out: {reason}", sys.stderr)
            # The record comes after the tokens: a song without one is listened to again.
            write_record(work, song, SongRecord(song=song.name, signature=song.signature, reason=reason))
            progress.update()
    records = {song.key: read_record(work, song) for song in songs}
    left_out = [record for record in records.values() if record is not None and record.reason]
    usable = [song for song in songs if (record := records[song.key]) is not None and not record.reason]
    return Listened(
        tokens=tokens,
        parts=[part for song in usable for part in index.songs if _is_of(part, song)],
        left_out=left_out,
    )


def discard_unfinished(work: Path) -> None:
    """Remove the stems that a killed run left in a folder WORK."""
    shutil.rmtree(work / UNFINISHED, ignore_errors=True)


def sung_gate(voice: Spans, start: float, samples: int) -> Tensor:
    """Return a gain [samples] from `start` (seconds) on: 1 around the voice, 0 elsewhere, faded."""
    margin, fade = GATE_MARGIN_SECONDS, GATE_FADE_SECONDS
    times = start + np.arange(samples) / SAMPLE_RATE_HZ
    points: list[float] = []
    gains: list[float] = []
    for begin, end in join_spans(voice, 2 * (margin + fade)):
        points += [begin - margin - fade, begin - margin, end + margin, end + margin + fade]
        gains += [0.0, 1.0, 1.0, 0.0]
    return torch.from_numpy(np.interp(times, points, gains)).float()


def voice_below_mix(stems: SongStems, voice: Spans) -> float:
    """Return by how many dB the vocal stem lies below the mix, in the median of the frames of `voice`."""
    parts = ("vocal", "mix")
    levels = {part: np.concatenate([frame_levels(block) for block in stems.blocks(part)]) for part in parts}
    times = (np.arange(len(levels["mix"])) + 0.5) / 10  # of frames of 0.1 s
    is_sung = np.zeros(len(times), dtype=bool)
    for start, end in voice:
        is_sung |= (start <= times) & (times < end)
    if not is_sung.any():
        return math.inf
    return float(np.median((levels["mix"] - levels["vocal"])[is_sung]))


def _require_accompaniment(stems: SongStems) -> None:
    levels = [np.zeros(0)]
    for blocks in zip(*(stems.blocks(stem) for stem in ACCOMPANIMENT_STEMS), strict=True):
        levels.append(frame_levels(torch.stack(blocks).sum(dim=0)))
    if loud_level(np.concatenate(levels)) < max(FLOOR_DB + 1, stems.mix_db - MOST_BELOW_MIX_DB):
        raise DataError("no accompaniment is heard in it; give whole songs, or pairs of vocal and band")


def _is_of(part: TokenSong, song: SongFile) -> bool:
    return part.id.startswith(f"{song.key}-")
