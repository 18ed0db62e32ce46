"""Figures of the tokenizer: what its codes keep of mel and chroma, and how they use the codebooks."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.metrics import code_counts, normalized_entropy, utilization
from duotok.recipes.evaluation.excerpts import Settings, choose_excerpts, read_items
from duotok.tokenizer.model import TRACKS, DuoTokenizer

_ITEMS, _SECONDS = 24, 20.0


def measure_tokenizer(settings: Settings) -> dict[str, float]:
    """Mel L1, chroma correlation, utilization, normalized entropy and number of tokens per track.

    Mel and chroma on excerpts; the use of the codebooks on everything that the test items hold.
    """
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    items = read_items(settings)
    excerpts = choose_excerpts(
        items, count=settings.items or _ITEMS, seconds=settings.seconds or _SECONDS, seed=settings.seed
    )
    figures: dict[str, float] = {"excerpts": len(excerpts), "items": len(items)}
    for track in TRACKS:
        errors, correlations = [], []
        for excerpt in tqdm(excerpts, desc=f"tokenizer, {track}: read-out", disable=None):
            wave = excerpt.read(track)[None]
            target = tokenizer.targets(wave)
            found = tokenizer.read_out(tokenizer.encode(wave, track), track)
            errors.append(float((found.mel - target.mel).abs().mean()))
            correlations.append(frame_correlation(found.chroma[0], target.chroma[0]))
        figures[f"{track}_mel_l1"] = float(np.mean(errors))
        figures[f"{track}_chroma_correlation"] = float(np.mean(correlations))
        counts = torch.zeros(tokenizer.codebook_size(track), dtype=torch.int64)
        for item in tqdm(items, desc=f"tokenizer, {track}: codebook", disable=None):
            codes = tokenizer.encode(item.read(track)[None], track)
            counts += code_counts(codes, len(counts))
        figures[f"{track}_utilization"] = utilization(counts)
        figures[f"{track}_normalized_entropy"] = normalized_entropy(counts)
        figures[f"{track}_test_tokens"] = int(counts.sum())
    return figures


def frame_correlation(found: Tensor, target: Tensor) -> float:
    """Mean over frames of the correlation of mean-free chroma.

    found, target: [frames, 12]. Frames without pitch in the target are left out; 0.0 when it has no others.
    """
    found, target = (chroma - chroma.mean(dim=-1, keepdim=True) for chroma in (found, target))
    heard = target.norm(dim=-1) > 1e-4
    if not bool(heard.any()):
        return 0.0
    return float(torch.nn.functional.cosine_similarity(found[heard], target[heard], dim=-1, eps=1e-6).mean())
