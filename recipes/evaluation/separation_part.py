"""Figures of separators: SI-SDR of the stems of test mixes, and of a real recording with known stems.

Run: python -m duotok.recipes.evaluation.score separation --corpus data/popband --out results.json \\
         --separator tokens=runs/small/token_separator/final --separator spleeter [--real-stems FOLDER]
Separators that are named are compared with the mask head and with the mix itself, by distances that bear the
little shifts of sounds that were written anew; the folder `settings.folder` gets separation.md.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.evaluation.audio_metrics import (
    chroma_correlation,
    flux_ratios,
    level_jumps_db,
    measure_visqol,
    mel_distance,
    require_visqol,
)
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.recipes.separation.adapters import MaskHeadSeparator, open_separator
from duotok.recipes.separation.stems import Separator
from duotok.recipes.separation.tokens_adapter import TokensSeparator
from duotok.renderer.latent_codec import open_codec
from duotok.tokenizer.acoustic_codec import AcousticCodec
from duotok.tokenizer.common.audio import read_audio
from duotok.tokenizer.common.files import write_text
from duotok.tokenizer.heads import STEMS

_SILENT_POWER = 1e-7  # a stem that does not play has no ratio
_STEP_SAMPLES = 4800  # between the places that stand for anywhere
_PARTS = ("vocal", "accompaniment", *STEMS[1:])
_COMPARED = {"chroma_correlation": chroma_correlation, "mel_distance": mel_distance}
_MEASURES = {
    "si_sdr_db": ("SI-SDR, dB", "{:.1f}"),
    "chroma_correlation": ("chroma", "{:.2f}"),
    "mel_distance": ("mel distance", "{:.2f}"),
    "visqol": ("ViSQOL", "{:.2f}"),
    "chroma_correlation_of_codec": ("chroma, all through the codec", "{:.2f}"),
    "mel_distance_of_codec": ("mel distance, all through the codec", "{:.2f}"),
    "visqol_of_codec": ("ViSQOL, all through the codec", "{:.2f}"),
}
Stems = Mapping[str, Tensor]  # [2, samples] each


def measure_separation(settings: Settings) -> dict[str, float]:
    """SI-SDR improvement in dB of each stem on mixes of test items, and of the vocal on a real song.

    The real song is `settings.real_stems`, a folder with mix.wav and the four stems; without it its figures
    are left out. These are of the bundle's mask head, left out where it has none. With `settings.separators`
    also SYSTEM_PART_MEASURE of them, the mask head and the mixture; real_... of the real song.
    """
    excerpts = excerpts_of(settings, 24, 12.0)
    own = MaskHeadSeparator(settings.bundle) if (settings.bundle / "separator").is_dir() else None
    comparison = _Comparison(settings, own) if settings.separators else None
    if own is None and comparison is None:
        return {}
    figures: dict[str, float] = {}
    gains: dict[str, list[float]] = {stem: [] for stem in STEMS}
    starts: list[float] = []
    for excerpt in tqdm(excerpts, desc="separation", disable=None):
        truth = {stem: excerpt.read(stem) for stem in STEMS}
        mix = torch.stack(list(truth.values())).sum(dim=0)
        if own is not None:
            for stem, gain in improvements(own.separate(mix), truth, mix).items():
                gains[stem].append(gain)
        if comparison is not None:
            comparison.add(truth, mix)
        starts.append(si_sdr(mix, truth["vocal"]))
    if own is not None:
        figures = {f"{stem}_si_sdr_improvement_db": float(np.mean(found)) for stem, found in gains.items()}
    figures |= {"mix_vocal_si_sdr_db": float(np.mean(starts)), "excerpts": len(excerpts)}
    tables = {} if comparison is None else {"": comparison.take()}
    figures |= {} if comparison is None else comparison.joints()
    if settings.real_stems is not None:
        truth = read_stems(settings.real_stems)
        mix = torch.stack(list(truth.values())).sum(dim=0)
        if own is not None:
            for stem, gain in improvements(own.separate(mix), truth, mix).items():
                figures[f"real_{stem}_si_sdr_improvement_db"] = gain
        if comparison is not None:
            comparison.add(truth, mix)
            tables["real_"] = comparison.take()
    for prefix, table in tables.items():
        figures |= {
            f"{prefix}{row}_{name}": value for row, found in table.items() for name, value in found.items()
        }
    if tables and settings.folder is not None:
        titles = {
            "": f"Means of {len(excerpts)} test mixes of {excerpts[0].seconds:g} s.",
            "real_": "A real song.",
        }
        texts = [f"{titles[prefix]}\n\n{render_table(table)}" for prefix, table in tables.items()]
        write_text(settings.folder / "separation.md", "\n".join(texts))
        print(f"{settings.folder}: separation.md")
    return figures


class _Comparison:
    """Figures of several separators on the same mixes."""

    def __init__(self, settings: Settings, own: MaskHeadSeparator | None) -> None:
        self._compared = _COMPARED
        if settings.visqol:
            require_visqol()
            self._compared = {**_COMPARED, "visqol": measure_visqol}
        self._separators: dict[str, Separator] = {} if own is None else {"mask_head": own}
        for named in settings.separators:
            name, _, checkpoint = named.partition("=")
            self._separators[name.replace("-", "_")] = open_separator(name, checkpoint or None)
        of_tokens = [each.codec for each in self._separators.values() if isinstance(each, TokensSeparator)]
        self._codec: AcousticCodec[Any] | None = of_tokens[0] if of_tokens else None
        if settings.codecs:
            self._codec = open_codec(settings.codecs[0])
        self._rows: dict[str, list[dict[str, float]]] = {}
        self._joints: dict[str, list[Tensor]] = {}

    def add(self, truth: Stems, mix: Tensor) -> None:
        """Measure all systems on a mix [2, samples] of known stems."""
        wanted = _parts(truth)
        coded = {part: self._code(wave) for part, wave in wanted.items()}
        for system, found, is_coded in self._separate(mix):
            others = {id(wave): wave if is_coded else self._code(wave) for wave in found.values()}
            for part, wave in found.items():
                target = wanted[part]
                if float(target.square().mean()) <= _SILENT_POWER:
                    continue
                row = {key: measure(target, wave) for key, measure in self._compared.items()}
                if not is_coded:
                    row["si_sdr_db"] = si_sdr(wave, target)
                if (reference := coded[part]) is not None:
                    other = others[id(wave)]
                    assert other is not None
                    row |= {f"{key}_of_codec": each(reference, other) for key, each in self._compared.items()}
                self._rows.setdefault(f"{system}_{part}", []).append(row)

    def _listen_to_joints(self, separator: TokensSeparator, written: Stems) -> None:
        """Flux and jumps of the level where windows meet, and every 0.1 s, in what was written."""
        samples = next(iter(written.values())).shape[-1]
        everywhere = range(_STEP_SAMPLES, samples - _STEP_SAMPLES, _STEP_SAMPLES)
        for name, places in (("joint", separator.joints(samples)), ("anywhere", list(everywhere))):
            for wave in written.values():
                if places and float(wave.square().mean()) > _SILENT_POWER:
                    for key, listen in (("flux_ratio", flux_ratios), ("level_jump_db", level_jumps_db)):
                        self._joints.setdefault(f"tokens_{name}_{key}", []).append(listen(wave, places))

    def joints(self) -> dict[str, float]:
        """Medians of tokens_joint_... and tokens_anywhere_...; equal ones are of joints that nobody hears."""
        return {name: float(torch.cat(found).median()) for name, found in self._joints.items()}

    def take(self) -> dict[str, dict[str, float]]:
        """Return the means SYSTEM_PART -> {measure: value} since the last time."""
        rows, self._rows = self._rows, {}
        return {
            name: {key: float(np.mean([row[key] for row in found])) for key in _MEASURES if key in found[0]}
            for name, found in rows.items()
        }

    def _separate(self, mix: Tensor) -> Iterator[tuple[str, dict[str, Tensor], bool]]:
        """Each system, what it takes for each part, and whether that comes out of the codec."""
        yield "mixture", dict.fromkeys(_PARTS, mix), False  # one wave, which passes the codec once
        for name, separator in self._separators.items():
            if isinstance(separator, TokensSeparator):
                written = separator.write(mix)
                self._listen_to_joints(separator, written)
                stems = {track: wave.expand(2, -1) for track, wave in written.items()}
                yield "tokens_written", _parts(stems), True
                yield name, _parts(separator.share(mix, written)), False
            else:
                yield name, _parts(separator.separate(mix)), False

    def _code(self, wave: Tensor) -> Tensor | None:
        if self._codec is None:
            return None
        return self._codec.decode(self._codec.encode(wave[None]), wave.shape[-1])[0]


def _parts(stems: Stems) -> dict[str, Tensor]:
    """Vocal and accompaniment, and the stems of the latter where they were told apart."""
    if "accompaniment" in stems:
        return {part: stems[part] for part in _PARTS[:2]}
    parts = {"vocal": stems["vocal"], "accompaniment": torch.stack([stems[s] for s in STEMS[1:]]).sum(dim=0)}
    is_apart = bool(stems["drums"].any() or stems["bass"].any())
    return parts | {stem: stems[stem] for stem in STEMS[1:]} if is_apart else parts


def render_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as Markdown: a row per system and part, "-" where there is no such figure."""
    shown = {key: _MEASURES[key] for key in _MEASURES if any(key in row for row in table.values())}
    lines = ["| | " + " | ".join(title for title, _ in shown.values()) + " |", "|---|" + "---|" * len(shown)]
    for part in _PARTS:
        for name, row in table.items():
            if name.endswith(f"_{part}"):
                cells = [form.format(row[key]) if key in row else "-" for key, (_, form) in shown.items()]
                lines.append(f"| {part}: {name.removesuffix(f'_{part}')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def improvements(found: Stems, truth: Stems, mix: Tensor) -> dict[str, float]:
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
