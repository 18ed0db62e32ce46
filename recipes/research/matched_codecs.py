"""The tokenizers of the matched-decoder protocol (P B.3.1), each reduced to frozen codes and their vectors.

"duotok" (its code vectors), "duotok_contextual" (what its upper half makes of them, the product's condition),
"mel_k_means" (the nearest of K centres of log-mel, fitted here), "encodec" and "dac" (`transformers`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import soxr
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.renderer.train_diffusion import CodeFeatures
from duotok.recipes.research.code_vectors import CodeVectors
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import CheckpointError, ConfigError
from duotok.tokenizer.model import HOP_SAMPLES, DuoTokenizer
from duotok.tokenizer.quantizers import k_means, nearest
from duotok.tokenizer.spectra import LogMel, level_gain

KINDS = ("duotok", "duotok_contextual", "mel_k_means", "encodec", "dac")
FRAME_RATE_HZ = SAMPLE_RATE_HZ / HOP_SAMPLES
MEL_PER_FRAME = 4


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
            own = torch.stack(_encode_residual(hidden, layers), dim=-1)  # [codec frames, codebooks]
        # Codec frames at the middles of equal parts of each 40 ms; none is left out, some come twice.
        times = (torch.arange(frames25 * per_frame) + 0.5) / (FRAME_RATE_HZ * per_frame)
        index = (times * rate_hz / hop).long().clamp_max(len(own) - 1)
        return own[index].reshape(frames25, per_frame * used)

    return FrozenCodec(
        source=CodeVectors.from_tables(torch.stack(tables), per_frame),
        encode=encode,
        bits_per_second=rate_hz / hop * used * math.log2(len(tables[0])),
    )


def _encode_residual(hidden: Tensor, layers: list[Any]) -> list[Tensor]:
    """Codes [frames] of each layer of EnCodec's residual quantizer for hidden [1, dim, frames]."""
    codes = []
    for layer in layers:
        indices = layer.encode(hidden)
        hidden = hidden - layer.decode(indices)
        codes.append(indices[0])
    return codes


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
