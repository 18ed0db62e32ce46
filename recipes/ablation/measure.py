"""Figures of one variant on held-out items: how predictable codes are and what they keep (P A, D, E.1)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import score_batch
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.evaluation.tokenizer_part import frame_correlation
from duotok.recipes.lm.tokens import TokenShards
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

RANKS = (1, 5, 10, 50)


def measure_variant(
    *, tokenizer: Path, lm: Path, tokens: Path, manifest: Path, seconds: float, device: str
) -> dict[str, Any]:
    """Return {"figures": {name: value}, "item_cnbpt": {item id: mean of both tracks}}.

    tokens: shards of the manifest's items by this tokenizer; seconds: length of the scored windows.
    """
    shards = TokenShards(tokens)
    figures, items = measure_predictability(
        DualTrackLM.from_pretrained(lm).to(device), shards, round(seconds * shards.index.frame_rate_hz)
    )
    figures |= measure_codes(shards)
    figures |= measure_read_out(DuoTokenizer.from_pretrained(tokenizer).to(device), shards, manifest)
    return {"figures": {name: round(value, 6) for name, value in figures.items()}, "item_cnbpt": items}


def measure_predictability(
    lm: DualTrackLM, shards: TokenShards, frames: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Unconditional cnBPT and Acc@k per track over windows of so many frames, side by side (P D.2).

    Returns the figures and the mean cnBPT of both tracks by item.
    """
    windows: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
    owners: list[str] = []
    for song in shards.index.songs:
        for start in range(0, song.frames - frames + 1, frames):
            for track, codes in shards.codes(song, start, frames).items():
                windows[track].append(codes)
            owners.append(song.id)
    if not owners:
        rate = shards.index.frame_rate_hz
        raise DataError(f"no held-out item has {frames / rate:g} s; shorten data.windows of the LM recipe")
    codes = {track: torch.stack(parts) for track, parts in windows.items()}
    scores = score_batch(lm, codes["vocal"], codes["accompaniment"], "unconditional")
    figures: dict[str, float] = {}
    normalized = []  # [windows] of each track
    for track in TRACKS:
        size = shards.index.codebook_sizes[track]
        bits = scores.bits_per_token(track)
        figures[f"{track}_bpt"] = bits
        figures[f"{track}_cnbpt"] = metrics.codebook_normalized_bits(bits, [size])
        figures |= {f"{track}_acc_at_{k}": scores.accuracy_at(track, k) for k in RANKS}
        by_window = scores.loss_nats[track].double().mean(dim=1)
        normalized.append(by_window / np.log(2) / metrics.mean_index_bits([size]))
    figures["average_cnbpt"] = float(np.mean([figures[f"{track}_cnbpt"] for track in TRACKS]))
    average = torch.stack(normalized).mean(dim=0).tolist()
    by_item: dict[str, list[float]] = {}
    for owner, value in zip(owners, average, strict=True):
        by_item.setdefault(owner, []).append(value)
    items = {owner: float(np.mean(values)) for owner, values in by_item.items()}
    figures["items"], figures["windows"] = len(items), len(owners)
    return figures, items


def measure_codes(shards: TokenShards) -> dict[str, float]:
    """Utilization and normalized entropy per track over all held-out tokens (P E.1)."""
    figures: dict[str, float] = {}
    for track in TRACKS:
        size = shards.index.codebook_sizes[track]
        counts = torch.zeros(size, dtype=torch.int64)
        for song in shards.index.songs:
            counts += metrics.code_counts(shards.codes(song)[track], size)
        figures[f"{track}_utilization"] = metrics.utilization(counts)
        figures[f"{track}_normalized_entropy"] = metrics.normalized_entropy(counts)
        figures[f"{track}_tokens"] = int(counts.sum())
    return figures


@torch.no_grad()
def measure_read_out(tokenizer: DuoTokenizer, shards: TokenShards, manifest: Path) -> dict[str, float]:
    """Mel distance (mean and deviation over items) and chroma correlation per track, from the codes alone."""
    items = {item.id: item for item in read_manifest(manifest)}
    device = tokenizer.mel_mean.device
    figures: dict[str, float] = {}
    for track in TRACKS:
        distances, correlations = [], []
        for song in tqdm(shards.index.songs, desc=f"{track}: read-out", disable=None):
            target = tokenizer.targets(items[song.id].read(track)[None].to(device))
            found = tokenizer.read_out(shards.codes(song)[track][None].to(device), track)
            distances.append(float((found.mel - target.mel).abs().mean()))
            correlations.append(frame_correlation(found.chroma[0], target.chroma[0]))
        figures[f"{track}_mel_l1"] = float(np.mean(distances))
        figures[f"{track}_mel_l1_deviation"] = float(np.std(distances))
        figures[f"{track}_chroma_correlation"] = float(np.mean(correlations))
    return figures
