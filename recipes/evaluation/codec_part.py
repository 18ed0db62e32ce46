"""Acoustic codecs by number of levels, in one table with DuoTok + diffusion and the VAE without codes.

Run: python -m duotok.recipes.evaluation.score codec --corpus data/popband --codec runs/small/codec/final \\
         --codec facebook/encodec_24khz --out results.json
The folder `settings.folder` gets codec.md.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.bundle import read_bundle_description
from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.request import resolve_settings
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of
from duotok.recipes.evaluation.renderer_part import (
    compare_sounds,
    mean_figures,
    rebuild_by_vae,
    rebuild_from_codes,
)
from duotok.renderer.latent_codec import LatentCodec, open_codec
from duotok.renderer.renderer import Renderer
from duotok.tokenizer.acoustic_codec import AcousticCodec
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_text
from duotok.tokenizer.model import DuoTokenizer

_COLUMNS = {
    "bits_per_second": ("bits per second", "{:,.0f}"),
    "chroma_correlation": ("chroma", "{:.2f}"),
    "fine_structure_50_300_hz": ("fine structure 50-300 Hz", "{:.2f}"),
    "fine_structure_300_1000_hz": ("300-1000", "{:.2f}"),
    "fine_structure_1000_3000_hz": ("1000-3000", "{:.2f}"),
    "log10_mel_l1": ("log10-mel L1", "{:.3f}"),
    "stereo_width_error_db": ("stereo width, error dB", "{:.1f}"),
}
Rows = dict[str, list[dict[str, float]]]


def measure_codec(settings: Settings) -> dict[str, float]:
    """Figures TRACK_SYSTEM_MEASURE of each codec, its first levels (1, 2, 4, ..., all), VAE and DuoTok.

    SYSTEM is NAME_LEVELS of a codec, NAME_vae of its VAE without codes, and duotok, the bundle's own codes
    made sound by diffusion (where it has a renderer, and not with --no-sound). Raises ConfigError where there
    is no codec.
    """
    own = settings.bundle / "codec"
    sources = settings.codecs or ((str(own),) if own.is_dir() else ())
    if not sources:
        raise ConfigError(f"the model {settings.bundle} has no acoustic codec; give one by --codec")
    codecs = {_short_name(source): open_codec(source) for source in sources}
    excerpts = excerpts_of(settings, 12, 8.0)
    has_duotok = settings.sound and (settings.bundle / "renderer").is_dir()
    duotok = _DuoTok(settings) if has_duotok else None
    means: dict[str, dict[str, float]] = {}
    for track in ("accompaniment", "vocal"):
        rows: Rows = {}
        for excerpt in tqdm(excerpts, desc=f"codec: {track}", disable=None):
            for system, figures in _measure_excerpt(codecs, duotok, excerpt, track):
                rows.setdefault(f"{track}_{system}", []).append(figures)
        means |= {name: mean_figures(found) for name, found in rows.items()}
    if settings.folder is not None:
        write_text(settings.folder / "codec.md", render_codecs(means, excerpts))
        print(f"{settings.folder}: codec.md")
    found = {f"{name}_{key}": value for name, row in means.items() for key, value in row.items()}
    return found | {"excerpts": len(excerpts), "excerpt_seconds": excerpts[0].seconds}


class _DuoTok:
    """The bundle's tokenizer and diffusion decoders, as a codec of one level."""

    def __init__(self, settings: Settings) -> None:
        self.tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
        self.renderer = Renderer.from_pretrained(settings.bundle / "renderer")
        self.renderer.require_tokenizer(self.tokenizer.fingerprint)
        self.generation = resolve_settings(read_bundle_description(settings.bundle).get("defaults") or {}, {})
        self.seed = settings.seed

    def measure(self, wave: Tensor, track: str) -> dict[str, float]:
        found = rebuild_from_codes(
            self.tokenizer, self.renderer, wave, track, self.generation, seed=self.seed
        )
        rate = self.tokenizer.frame_rate_hz * math.log2(self.tokenizer.codebook_size(track))
        return {"bits_per_second": rate} | compare_sounds(wave, match_level(found, wave))


def _measure_excerpt(
    codecs: Mapping[str, AcousticCodec[Any]], duotok: _DuoTok | None, excerpt: Excerpt, track: str
) -> Iterator[tuple[str, dict[str, float]]]:
    wave = excerpt.read(track)
    for name, codec in codecs.items():
        codes = codec.encode(wave[None])
        for levels in levels_measured(codec.codebooks):
            found = codec.decode(codes[:, :levels], wave.shape[-1])[0]
            yield (
                f"{name}_{levels}",
                {"bits_per_second": codec.bits_per_second(levels)} | compare_sounds(wave, found),
            )
        if isinstance(codec, LatentCodec):
            yield f"{name}_vae", compare_sounds(wave, rebuild_by_vae(codec.vae, wave))
    if duotok is not None and track in duotok.renderer.decoders:
        yield "duotok", duotok.measure(wave, track)


def levels_measured(codebooks: int) -> list[int]:
    """1, 2, 4, ... and all levels of a codec."""
    return [*(2**n for n in range(codebooks.bit_length()) if 2**n < codebooks), codebooks]


def render_codecs(means: Mapping[str, Mapping[str, float]], excerpts: Sequence[Excerpt]) -> str:
    """The table as Markdown: a row per system, "-" where a system has no such figure."""
    lines = [
        f"Means of {len(excerpts)} excerpts of {excerpts[0].seconds:g} s; _N: the first N levels of a codec.",
        "",
        "| | " + " | ".join(title for title, _ in _COLUMNS.values()) + " |",
        "|---|" + "---|" * len(_COLUMNS),
    ]
    for name, row in means.items():
        cells = [form.format(row[key]) if key in row else "-" for key, (_, form) in _COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short_name(source: str) -> str:
    path = Path(source)
    name = path.parent.name if path.name == "final" else path.name
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "codec"
