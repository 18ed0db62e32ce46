"""Figures of the separator: SI-SDR of the stems of test mixes, and of a real recording with known stems."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.recipes.separation.adapters import MaskHeadSeparator
from duotok.tokenizer.common.audio import read_audio
from duotok.tokenizer.heads import STEMS

_SILENT_POWER = 1e-7  # a stem that does not play has no ratio


def measure_separation(settings: Settings) -> dict[str, float]:
    """SI-SDR improvement in dB of each stem on mixes of test items, and of the vocal on a real song.

    The real song is `settings.real_stems`, a folder with mix.wav and the four stems; without it its figures
    are left out. Returns nothing at all for a bundle without separator.
    """
    excerpts = excerpts_of(settings, 24, 12.0)
    if not (settings.bundle / "separator").is_dir():
        return {}
    separator = MaskHeadSeparator(settings.bundle)
    gains: dict[str, list[float]] = {stem: [] for stem in STEMS}
    starts: list[float] = []
    for excerpt in tqdm(excerpts, desc="separation", disable=None):
        truth = {stem: excerpt.read(stem) for stem in STEMS}
        mix = torch.stack(list(truth.values())).sum(dim=0)
        found = separator.separate(mix)
        for stem, gain in improvements(found, truth, mix).items():
            gains[stem].append(gain)
        starts.append(si_sdr(mix, truth["vocal"]))
    figures = {f"{stem}_si_sdr_improvement_db": float(np.mean(values)) for stem, values in gains.items()}
    figures |= {"mix_vocal_si_sdr_db": float(np.mean(starts)), "excerpts": len(excerpts)}
    if settings.real_stems is not None:
        truth = read_stems(settings.real_stems)
        mix = torch.stack(list(truth.values())).sum(dim=0)
        for stem, gain in improvements(separator.separate(mix), truth, mix).items():
            figures[f"real_{stem}_si_sdr_improvement_db"] = gain
    return figures


def improvements(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], mix: Tensor) -> dict[str, float]:
    """SI-SDR of each playing stem over that of the mix taken for it, in dB."""
    return {
        stem: si_sdr(found[stem], wave) - si_sdr(mix, wave)
        for stem, wave in truth.items()
        if float(wave.square().mean()) > _SILENT_POWER
    }


def si_sdr(estimate: Tensor, target: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019) of waves of one shape."""
    estimate, target = (wave.double().flatten() - wave.double().mean() for wave in (estimate, target))
    scaled = target * (estimate @ target) / (target @ target).clamp_min(1e-12)
    noise = (estimate - scaled).square().sum().clamp_min(1e-12)
    return float(10 * torch.log10(scaled.square().sum().clamp_min(1e-12) / noise))


def read_stems(folder: Path) -> dict[str, Tensor]:
    """The four stems of a folder, cut to the shortest: {stem: [2, samples]} at 48 kHz."""
    waves = {stem: read_audio(folder / f"{stem}.wav") for stem in STEMS}
    samples = min(wave.shape[-1] for wave in waves.values())
    return {stem: wave[:, :samples] for stem, wave in waves.items()}
