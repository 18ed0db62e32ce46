"""The same diffusion decoder on the frozen codes of several tokenizers, under one budget (P 5.4, B.3.1).

Run: python -m duotok.recipes.research.matched recipes/research/matched/small.yaml --out runs/matched
For each codec in turn: encodes the corpus, trains the decoder (--minutes are for one codec), listens to
validation songs; then writes matched.md and matched.json. The same command goes on where it was stopped.
Codecs: "duotok" (its code vectors), "duotok_contextual" (what its upper half makes of them, the product's
condition), "mel_k_means" (the nearest of K centres, fitted here), "encodec" and "dac" (`transformers`).
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional

from duotok.recipes.accompany.pipeline import choose_device
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.evaluation.audio_metrics import LIVELINESS, MEASURES, measure_closeness
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_split
from duotok.recipes.evaluation.renderer_part import mean_figures
from duotok.recipes.renderer.latents import (
    LatentShards,
    ShardOrigin,
    add_items,
    pad_to_frames,
    require_latent_rate,
)
from duotok.recipes.renderer.train_diffusion import CodeFeatures, DataConfig, DiffusionLossConfig, make_task
from duotok.recipes.renderer.train_diffusion import Config as DecoderConfig
from duotok.recipes.training.loop import TrainConfig, run_training
from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.renderer.renderer import Renderer, open_vae
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.checkpoint import Component
from duotok.tokenizer.common.command import guard, show_progress_messages
from duotok.tokenizer.common.config import config_from_dict, load_config
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.common.files import read_json, write_json, write_text
from duotok.tokenizer.model import HOP_SAMPLES, MEL_PER_FRAME, TRACKS, DuoTokenizer
from duotok.tokenizer.quantizers import k_means, nearest
from duotok.tokenizer.spectra import LogMel, level_gain

KINDS = ("duotok", "duotok_contextual", "mel_k_means", "encodec", "dac")
FRAME_RATE_HZ = SAMPLE_RATE_HZ / HOP_SAMPLES


@dataclass(frozen=True, kw_only=True)
class CodeVectorsConfig:
    """Shape of a tokenizer's codes and vectors."""

    codebooks: int = 1  # whose vectors add up, as those of residual quantizers do
    codebook_size: int = 1024
    dim: int = 64  # of one vector
    per_frame: int = 1  # codec frames inside one frame of 40 ms


class CodeVectors(Component[CodeVectorsConfig]):
    """Looks codes up; nothing else, so that what is compared is the codes."""

    KIND = "code_vectors"
    CONFIG = CodeVectorsConfig

    tables: Tensor

    def __init__(self, config: CodeVectorsConfig) -> None:
        super().__init__(config)
        self.register_buffer("tables", torch.zeros(config.codebooks, config.codebook_size, config.dim))

    @classmethod
    def from_tables(cls, tables: Tensor, per_frame: int = 1) -> "CodeVectors":
        """Take tables [codebooks, codebook_size, dim]."""
        codebooks, size, dim = tables.shape
        vectors = cls(
            CodeVectorsConfig(codebooks=codebooks, codebook_size=size, dim=dim, per_frame=per_frame)
        )
        vectors.tables.copy_(tables)
        return vectors.eval()

    @property
    def dim(self) -> int:
        """Width of the features: the vectors of a frame's codec frames side by side."""
        return self.config.per_frame * self.config.dim

    def features(self, codes: Tensor, track: str) -> Tensor:
        """Return features [batch, frames25, dim] of codes [batch, frames25, per_frame * codebooks].

        The codes of one codec frame lie side by side; the track makes no difference.
        """
        by_codebook = codes.unflatten(2, (self.config.per_frame, self.config.codebooks)).unbind(dim=3)
        # Each term is [batch, frames25, per_frame, dim].
        terms = [
            functional.embedding(own, table) for own, table in zip(by_codebook, self.tables, strict=True)
        ]
        return torch.stack(terms).sum(dim=0).flatten(2)


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """One tokenizer of the comparison."""

    kind: str
    weights: str = ""  # duotok: its folder; encodec, dac: a folder or a name on the hub
    codebook_size: int = 1024  # of mel_k_means
    mel_bands: int = 80  # of mel_k_means
    codebooks: int = 0  # encodec, dac: how many of the residual codebooks; 0 = all

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"a codec's kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if (self.kind == "mel_k_means") == bool(self.weights):
            need = "takes no weights, it is fitted" if self.weights else "needs weights"
            raise ConfigError(f"a codec of the kind {self.kind} {need}")
        if self.codebook_size < 2 or self.mel_bands < 1 or self.codebooks < 0:
            raise ConfigError("a codec needs codebook_size >= 2, mel_bands >= 1 and codebooks >= 0")


@dataclass(frozen=True, kw_only=True)
class FrozenCodec:
    """Wave to codes, and codes to the features that a decoder is conditioned on."""

    source: CodeFeatures  # features of codes [batch, frames25, ...]
    encode: Callable[[Tensor], Tensor]  # wave [2, samples] at 48 kHz -> codes [ceil(samples / 1920), ...]
    bits_per_second: float


def open_codec(config: CodecConfig, track: str, waves: Callable[[], Iterable[Tensor]]) -> FrozenCodec:
    """Return a codec; waves() gives training waves [2, samples], for those that are fitted."""
    if config.kind == "mel_k_means":
        return make_mel_codec(fit_mel_centres(waves(), config), config.mel_bands)
    if config.kind in ("encodec", "dac"):
        return wrap_residual_codec(_load_pretrained(config), config.codebooks)
    tokenizer = DuoTokenizer.from_pretrained(config.weights)

    def encode(wave: Tensor) -> Tensor:
        return tokenizer.encode(wave[None], track)[0]

    bits = FRAME_RATE_HZ * math.log2(tokenizer.codebook_size(track))
    if config.kind == "duotok_contextual":
        return FrozenCodec(source=tokenizer, encode=encode, bits_per_second=bits)
    vectors = CodeVectors.from_tables(tokenizer.code_vectors(track)[None])
    return FrozenCodec(source=vectors, encode=lambda wave: encode(wave)[:, None], bits_per_second=bits)


def mel_vectors(wave: Tensor, mel: LogMel) -> Tensor:
    """Return the log-mel of each frame of 40 ms [frames25, 4 * bands] of wave [2, samples], level evened."""
    mono = wave.mean(dim=0, keepdim=True)
    mono = functional.pad(mono, (0, -mono.shape[1] % HOP_SAMPLES))
    return mel(mono * level_gain(mono))[0].unflatten(0, (-1, MEL_PER_FRAME)).flatten(1)


def fit_mel_centres(waves: Iterable[Tensor], config: CodecConfig, iterations: int = 12) -> Tensor:
    """Return k-means centres [codebook_size, 4 * bands] of the training waves' frames."""
    mel = LogMel(config.mel_bands)
    return k_means(torch.cat([mel_vectors(wave, mel) for wave in waves]), config.codebook_size, iterations)


def make_mel_codec(centres: Tensor, mel_bands: int) -> FrozenCodec:
    """A plain tokenizer: the nearest centre of each frame's log-mel."""
    mel = LogMel(mel_bands)

    def encode(wave: Tensor) -> Tensor:
        return nearest(mel_vectors(wave, mel), centres)[0][:, None]

    return FrozenCodec(
        source=CodeVectors.from_tables(centres[None]),
        encode=encode,
        bits_per_second=FRAME_RATE_HZ * math.log2(len(centres)),
    )


def wrap_residual_codec(model: Any, codebooks: int = 0) -> FrozenCodec:
    """An EncodecModel or a DacModel of `transformers`; codebooks: how many are used, 0 = all."""
    from transformers import DacModel

    is_dac = isinstance(model, DacModel)
    model.requires_grad_(False).eval()
    rate_hz = model.config.sampling_rate
    channels = 1 if is_dac else model.config.audio_channels
    hop = math.prod(model.config.downsampling_ratios if is_dac else model.config.upsampling_ratios)
    layers: list[Any] = list(model.quantizer.quantizers if is_dac else model.quantizer.layers)
    used = codebooks or len(layers)
    if used > len(layers):
        raise ConfigError(f"this codec has {len(layers)} codebooks, {used} are asked for")
    layers = layers[:used]
    tables: list[Tensor]
    if is_dac:  # each codebook goes through its own projection before they add up
        tables = [layer.out_proj(layer.codebook.weight.T[None])[0].T for layer in layers]
    else:
        tables = [layer.codebook.embed for layer in layers]
    per_frame = math.ceil(rate_hz / hop / FRAME_RATE_HZ)

    @torch.no_grad()
    def encode(wave: Tensor) -> Tensor:
        frames25 = -(-wave.shape[1] // HOP_SAMPLES)
        given = wave.mean(dim=0, keepdim=True) if channels == 1 else wave
        if rate_hz != SAMPLE_RATE_HZ:
            given = torch.from_numpy(soxr.resample(given.T.numpy(), SAMPLE_RATE_HZ, rate_hz)).T
        if is_dac:
            own = model.encode(given[None], n_quantizers=used).audio_codes[0, :used].T
        else:
            if model.config.normalize:
                given = given / given.mean(dim=0).square().mean().sqrt().clamp_min(1e-8)
            hidden = model.encoder(given[None])
            codes = []
            for layer in layers:
                codes.append(layer.encode(hidden))
                hidden = hidden - layer.decode(codes[-1])
            own = torch.cat(codes).T  # [codec frames, codebooks]
        # Codec frames at the middles of equal parts of each 40 ms; none is left out, some come twice.
        times = (torch.arange(frames25 * per_frame) + 0.5) / (FRAME_RATE_HZ * per_frame)
        index = (times * rate_hz / hop).long().clamp_max(len(own) - 1)
        return own[index].reshape(frames25, per_frame * used)

    return FrozenCodec(
        source=CodeVectors.from_tables(torch.stack(tables), per_frame),
        encode=encode,
        bits_per_second=rate_hz / hop * used * math.log2(len(tables[0])),
    )


def _load_pretrained(config: CodecConfig) -> Any:
    from transformers import DacModel, EncodecModel

    kind = DacModel if config.kind == "dac" else EncodecModel
    try:
        return kind.from_pretrained(config.weights, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"the {config.kind} weights {config.weights} cannot be read: {reason}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class MatchedDataConfig:
    """What the decoders learn from, and what they are judged on."""

    train: str  # manifest
    corpus: str  # folder with validation.jsonl (and test.jsonl)
    split: str = "validation"
    train_items: int = 0  # the first so many of the manifest; 0 = all
    fit_items: int = 60  # of these, for codecs that are fitted
    seconds: float = 10.0  # of a training window
    excerpts: int = 12
    excerpt_seconds: float = 8.0

    def __post_init__(self) -> None:
        for name in ("fit_items", "excerpts", "excerpt_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.train_items < 0:
            raise ConfigError(f"data.train_items must not be negative, got {self.train_items}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison; feature_dim of the model follows from each codec."""

    vae: str  # folder
    data: MatchedDataConfig
    codecs: dict[str, Any]  # name in the table -> settings of a CodecConfig
    track: str = "accompaniment"
    steps: int = 50  # of the solver when listening (P C.4)
    guidance: float = 2.0
    model: DiffusionDecoderConfig = field(default_factory=DiffusionDecoderConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.track not in TRACKS:
            raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {self.track!r}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if not self.codecs:
            raise ConfigError("codecs must name at least one codec")
        self.codec_configs()

    def codec_configs(self) -> dict[str, CodecConfig]:
        """The checked settings of every codec."""
        return {
            name: config_from_dict(CodecConfig, settings, f"codecs.{name}")
            for name, settings in self.codecs.items()
        }


@torch.no_grad()
def judge(config: Config, remake: Callable[[Tensor, int], Tensor]) -> dict[str, float]:
    """Mean quality of remake(wave [2, samples], seed) over the excerpts that every codec is judged on."""
    data, seed = config.data, config.train.seed
    items = read_split(Path(data.corpus), data.split)
    excerpts = choose_excerpts(items, count=data.excerpts, seconds=data.excerpt_seconds, seed=seed)
    waves = (excerpt.read(config.track) for excerpt in excerpts)
    return mean_figures([measure_closeness(w, remake(w, seed + number)) for number, w in enumerate(waves)])


def judge_decoder(config: Config, codec: FrozenCodec, folder: Path) -> dict[str, Any]:
    """Mean quality of recording -> codes -> latents -> sound."""
    decoder = DiffusionDecoder.from_pretrained(folder)
    decoder.require(tokenizer=codec.source.fingerprint)
    device = choose_device("auto")
    renderer = Renderer(open_vae(config.vae), {config.track: decoder}).to(device)
    assert isinstance(codec.source, nn.Module)
    codec.source.cpu()  # training may have moved it
    solver: dict[str, Any] = {"steps": config.steps, "guidance": config.guidance, "track": config.track}

    def remake(wave: Tensor, seed: int) -> Tensor:
        codes = codec.encode(pad_to_frames(wave))[None]
        features = codec.source.features(codes, config.track)[0].to(device)
        return renderer.decode(renderer.render_latents(features, seed=seed, **solver), wave.shape[-1]).cpu()

    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    return judge(config, remake) | {"decoder_parameters": parameters}


def judge_vae(config: Config) -> dict[str, Any]:
    """The line of the autoencoder alone: what a perfect decoder of perfect codes would reach."""
    vae = open_vae(config.vae)
    figures = judge(config, lambda wave, _: vae.decode(vae.encode(wave[None]), wave.shape[-1])[0])
    return {"codec": "latents themselves", "kind": "vae", **figures}


def render_table(rows: Sequence[dict[str, Any]], config: Config, minutes: float | None) -> str:
    """The Markdown table, with the budget above it."""
    budget = f"{config.train.steps} steps" if minutes is None else f"{minutes:g} minutes"
    heads = ["codec", "bits per second", "feature width", "decoder weights"]
    heads += [*(measure.label for measure in MEASURES), "movement"]
    lines = [
        f"Matched decoder ({config.track}): {budget} of training each, batches of "
        f"{config.train.batch_size} x {config.data.seconds:g} s; {config.data.excerpts} "
        f"{config.data.split} excerpts of {config.data.excerpt_seconds:g} s, {config.steps} steps, "
        f"guidance {config.guidance:g}.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in rows:
        cells = [row["codec"]]
        cells.append(f"{row['bits_per_second']:.0f}" if "bits_per_second" in row else "")
        cells.append(str(row.get("feature_dim", "")))
        cells.append(f"{row['decoder_parameters'] / 1e6:.2f}M" if "decoder_parameters" in row else "")
        cells += [f"{row[measure.name]:.3f}" for measure in MEASURES] + [f"{row[LIVELINESS]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_comparison(config: Config, out: Path, minutes: float | None) -> None:
    """Encode, train and listen for every codec; write the table."""
    rows, table = [judge_vae(config)], ""
    for name, codec_config in config.codec_configs().items():
        rows.append(run_codec(config, name, codec_config, out / name, minutes))
        write_json(out / "matched.json", rows)
        table = render_table(rows, config, minutes)
        write_text(out / "matched.md", table)
    print(table, end="")


def run_codec(
    config: Config, name: str, codec_config: CodecConfig, folder: Path, minutes: float | None
) -> dict[str, Any]:
    """One line of the table; what is there from an earlier run of the same settings is kept."""
    settings = {**asdict(replace(config, codecs={name: config.codecs[name]})), "minutes": minutes}
    kept, done = folder / "settings.json", folder / "result.json"
    if kept.exists() and read_json(kept) != settings:
        raise DataError(f"{folder} was made by other settings; give another --out or delete it")
    write_json(kept, settings)
    if done.exists():
        return read_json(done)
    codec, shards = prepare_codec(config, codec_config, folder)
    assert shards.origin is not None
    recipe = DecoderConfig(
        tokenizer=str(folder / "codec"),
        data=DataConfig(latents=str(shards.folder), seconds=config.data.seconds, context_seconds=0.0),
        model=replace(config.model, feature_dim=codec.source.dim),
        loss=config.loss,
        train=config.train,
    )
    if not (folder / "run" / "final").is_dir():
        task = make_task(shards, shards.origin, codec.source, recipe)
        run_training(task, config.train, folder / "run", minutes=minutes)
    row = {"codec": name, "kind": codec_config.kind, "feature_dim": codec.source.dim}
    row |= {"bits_per_second": codec.bits_per_second}
    row |= judge_decoder(config, codec, folder / "run" / "final")
    write_json(done, row)
    return row


def prepare_codec(
    config: Config, codec_config: CodecConfig, folder: Path
) -> tuple[FrozenCodec, LatentShards]:
    """Open (or fit) a codec and encode the training items that no shard holds yet."""
    items = read_manifest(config.data.train)[: config.data.train_items or None]
    vae = open_vae(config.vae)
    require_latent_rate(vae, config.vae, FRAME_RATE_HZ)
    fitted = folder / "codec"
    if codec_config.kind == "mel_k_means" and fitted.is_dir():
        codec = make_mel_codec(CodeVectors.from_pretrained(fitted).tables[0], codec_config.mel_bands)
    else:
        fit_items = items[: config.data.fit_items]
        codec = open_codec(codec_config, config.track, lambda: (i.read(config.track) for i in fit_items))
    if isinstance(codec.source, CodeVectors):
        codec.source.save_pretrained(fitted)
    origin = ShardOrigin(
        track=config.track,
        tokenizer_fingerprint=str(codec.source.fingerprint),
        vae_fingerprint=str(vae.fingerprint),
    )

    def encode(item: Item) -> tuple[Tensor, Tensor]:
        wave = pad_to_frames(item.read(config.track))
        return codec.encode(wave), vae.encode_song(wave).T

    add_items(folder / "latents", items, encode, origin)
    shards = LatentShards(folder / "latents")
    if shards.origin is None:
        raise DataError(f"the manifest {config.data.train} is empty; make a corpus first")
    return codec, shards


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description="One decoder on the frozen codes of several tokenizers")
    parser.add_argument("config", type=Path, help="YAML file of the comparison")
    parser.add_argument("--out", type=Path, required=True, help="folder of the codecs' runs and the table")
    parser.add_argument("--minutes", type=float, help="train each decoder for this long, not for train.steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args(argv)

    def compare() -> None:
        show_progress_messages()
        run_comparison(load_config(Config, arguments.config, arguments.set), arguments.out, arguments.minutes)

    return guard(compare)


if __name__ == "__main__":
    sys.exit(main())
