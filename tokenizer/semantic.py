"""Semantic tokens at 50 Hz: the nearest of k-means centroids to each frame of a self-supervised encoder.

Either this project's own encoder (BEST-RQ of stage 1, at 25 Hz, heard twice, half a frame apart), or a
`HubertModel` of transformers, as in AccompGen (arXiv 2604.09054) and SingSong. With the encoder inside, the
folder is all that turns a wave into tokens.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Encoder, LocalTransformer
from .common.audio import SAMPLE_RATE_HZ
from .common.checkpoint import Component
from .common.chunks import chunk_size, join_chunks
from .common.config import config_from_dict
from .common.errors import AudioError, CheckpointError, ConfigError, DataError
from .model import HOP_SAMPLES as TOKENIZER_HOP_SAMPLES
from .model import DuoTokenizer, DuoTokenizerConfig
from .spectra import LogMel, level_gain

RATE_HZ = 50.0
HOP_SAMPLES = round(SAMPLE_RATE_HZ / RATE_HZ)
OWN, HUBERT = "duotok", "hubert"
_CHUNK_FRAMES, _HALO_FRAMES = 1500, 100  # of HuBERT, which has no bounded reach: 30 s and 2 s
_HUBERT_RATE_HZ = 16_000
_OWN_SETTINGS = ("mel_bands", "dim", "heads", "feed_forward_dim", "blocks", "attention_window")
_NOT_SETTINGS = ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype")  # of HuBERT


@dataclass(frozen=True, kw_only=True)
class SemanticTokenizerConfig:
    """Settings of a semantic tokenizer."""

    kind: str = OWN  # of the encoder: duotok or hubert
    encoder: dict[str, Any] = field(default_factory=dict)  # its settings
    layer: int = -1  # of HuBERT, whose states are clustered: 1 is the first one's output, -1 the last one's
    clusters: int = 1024

    def __post_init__(self) -> None:
        if self.kind not in (OWN, HUBERT):
            raise ConfigError(f"the encoder's kind must be {OWN} or {HUBERT}, got {self.kind!r}")
        if self.clusters < 2:
            raise ConfigError(f"clusters must be at least 2, got {self.clusters}")


class SemanticTokenizer(Component[SemanticTokenizerConfig]):
    """48 kHz wave -> codes [batch, frames] at 50 Hz."""

    KIND = "semantic_tokenizer"
    CONFIG = SemanticTokenizerConfig

    frame_rate_hz, hop_samples = RATE_HZ, HOP_SAMPLES

    centroids: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: SemanticTokenizerConfig) -> None:
        super().__init__(config)
        own = config.kind == OWN
        self.encoder = _OwnEncoder(config.encoder) if own else _HubertEncoder(config.encoder, config.layer)
        dim = self.encoder.dim
        # Features are brought to zero mean and unit deviation before they are compared.
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.register_buffer("centroids", torch.randn(config.clusters, dim))

    @classmethod
    def on_tokenizer(cls, tokenizer: DuoTokenizer, *, clusters: int) -> "SemanticTokenizer":
        """Return one with random centroids on the encoder of a DuoTok tokenizer of any stage."""
        settings = {name: getattr(tokenizer.config, name) for name in _OWN_SETTINGS}
        model = cls(SemanticTokenizerConfig(encoder=settings, clusters=clusters))
        state = tokenizer.state_dict()
        model.encoder.load_state_dict({name: state[name] for name in model.encoder.state_dict()})
        return model.eval()

    @classmethod
    def on_hubert(cls, source: str | Path, *, clusters: int, layer: int = -1) -> "SemanticTokenizer":
        """Return the same on the HubertModel of a folder or hub id; CheckpointError where there is none."""
        from transformers import HubertModel

        try:
            hubert = HubertModel.from_pretrained(str(source))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"no HubertModel can be read from {source}: {reason}") from error
        told = hubert.config.to_diff_dict()
        settings = {name: told[name] for name in told if name not in _NOT_SETTINGS}
        model = cls(SemanticTokenizerConfig(kind=HUBERT, encoder=settings, layer=layer, clusters=clusters))
        assert isinstance(model.encoder, _HubertEncoder)
        model.encoder.model.load_state_dict(hubert.state_dict())
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.centroids.device

    @torch.no_grad()
    def features(self, wave: Tensor) -> Tensor:
        """wave [batch, channels, samples] at 48 kHz -> features [batch, frames, dim] that are clustered."""
        if wave.ndim != 3 or wave.shape[-1] == 0:
            raise AudioError(f"a wave must be [batch, channels, samples], got shape {tuple(wave.shape)}")
        frames = -(-wave.shape[-1] // HOP_SAMPLES)
        mono = wave.mean(dim=1) * level_gain(wave)
        mono = functional.pad(mono, (0, frames * HOP_SAMPLES - mono.shape[-1]))
        return self.encoder.features(mono)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """wave [batch, channels, samples] at 48 kHz -> codes [batch, ceil(samples / 960)] int64."""
        return self.nearest(self.features(wave))

    def nearest(self, features: Tensor) -> Tensor:
        """Return the codes [..., frames] of features [..., frames, dim]."""
        return torch.cdist((features - self.mean) / self.deviation, self.centroids).argmin(dim=-1)


class _OwnEncoder(nn.Module):
    """The encoder of stage 1; its frames of 40 ms, heard twice, give one every 20 ms."""

    mel_mean: Tensor
    mel_deviation: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        config = config_from_dict(DuoTokenizerConfig, settings, "encoder")
        self.dim = config.dim
        self.log_mel = LogMel(config.mel_bands)
        self.register_buffer("mel_mean", torch.zeros(config.mel_bands))
        self.register_buffer("mel_deviation", torch.ones(config.mel_bands))
        transformer = LocalTransformer(
            dim=config.dim,
            heads=config.heads,
            hidden=config.feed_forward_dim,
            blocks=config.blocks,
            window=config.attention_window,
        )
        self.encoder = Encoder(config.mel_bands, transformer, config.dim)

    def features(self, mono: Tensor) -> Tensor:
        """mono [batch, frames * 960] -> [batch, frames, dim]."""
        frames = mono.shape[-1] // HOP_SAMPLES
        quarter = HOP_SAMPLES // 2
        # A long frame from a quarter of itself before a short one on has its middle where that has its own.
        waves = (functional.pad(mono, (quarter, 0)), mono[:, quarter:])
        early, late = (self._encode(wave, -(-frames // 2)) for wave in waves)
        return torch.stack([early, late], dim=2).flatten(1, 2)[:, :frames]

    def _encode(self, wave: Tensor, frames: int) -> Tensor:
        """The first frames of 40 ms of wave [batch, samples], silence after its end: [batch, frames, dim]."""
        samples = frames * TOKENIZER_HOP_SAMPLES
        wave = functional.pad(wave, (0, max(0, samples - wave.shape[-1])))[:, :samples]

        def encode_chunk(low: int, high: int) -> Tensor:
            mel = self.log_mel(wave[:, low * TOKENIZER_HOP_SAMPLES : high * TOKENIZER_HOP_SAMPLES])
            return self.encoder((mel - self.mel_mean) / self.mel_deviation)

        halo = self.encoder.transformer.reach_frames + 4  # 4: downsampling and the spectrogram's window
        size = chunk_size(DuoTokenizer.CHUNK_FRAMES, halo)
        return join_chunks(frames, encode_chunk, size=size, halo=halo)


class _HubertEncoder(nn.Module):
    """States of a layer of a HubertModel."""

    def __init__(self, settings: dict[str, Any], layer: int) -> None:
        super().__init__()
        from transformers import HubertConfig, HubertModel

        config = HubertConfig(**settings)
        self.dim, self.hop, layers = (
            config.hidden_size,
            math.prod(config.conv_stride),
            config.num_hidden_layers,
        )
        if self.hop * RATE_HZ != _HUBERT_RATE_HZ:
            raise ConfigError(
                f"this HubertModel gives {_HUBERT_RATE_HZ / self.hop:g} frames per second, semantic tokens "
                f"need {RATE_HZ:g}; give another one"
            )
        if not -layers <= layer <= layers:
            raise ConfigError(f"layer must be from {-layers} to {layers} for this HubertModel, got {layer}")
        self.layer = layer
        reach = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            reach = (reach - 1) * stride + kernel
        self.margin = reach - self.hop  # samples that a frame sees beside its own
        self.model = HubertModel(config)

    def features(self, mono: Tensor) -> Tensor:
        """mono [batch, frames * 960] -> [batch, frames, dim]."""
        low = soxr.resample(mono.cpu().numpy().T, SAMPLE_RATE_HZ, _HUBERT_RATE_HZ).T
        wave = torch.from_numpy(np.ascontiguousarray(low)).to(mono)
        frames = mono.shape[-1] // HOP_SAMPLES
        wave = functional.pad(wave, (0, max(0, frames * self.hop - wave.shape[-1])))[:, : frames * self.hop]
        wave = wave - wave.mean(dim=1, keepdim=True)
        wave = wave / wave.std(dim=1, keepdim=True).clamp_min(1e-5)

        def encode_chunk(first: int, stop: int) -> Tensor:
            part = wave[:, first * self.hop : stop * self.hop]
            part = functional.pad(part, (self.margin // 2, self.margin - self.margin // 2))
            return self.model(part, output_hidden_states=True).hidden_states[self.layer]

        return join_chunks(frames, encode_chunk, size=_CHUNK_FRAMES, halo=_HALO_FRAMES)


@torch.no_grad()
def fit_centroids(features: Tensor, clusters: int, *, rounds: int = 20, seed: int = 0) -> Tensor:
    """Return k-means centroids [clusters, dim] of features [samples, dim], begun by k-means++.

    An empty cluster moves to the sample that is furthest from its own. Raises DataError for fewer samples
    than clusters.
    """
    if len(features) < clusters:
        raise DataError(f"{len(features)} frames are too few for {clusters} clusters; give more or fewer")
    generator = torch.Generator().manual_seed(seed)
    centroids = features[torch.randint(len(features), (1,), generator=generator)]
    nearest = torch.cdist(features, centroids)[:, 0]
    while len(centroids) < clusters:
        weights = nearest.square().double().clamp_min(1e-12).cumsum(dim=0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * weights[-1]
        chosen = features[torch.searchsorted(weights, drawn).clamp_max(len(features) - 1)]
        centroids = torch.cat([centroids, chosen])
        nearest = torch.minimum(nearest, torch.cdist(features, chosen)[:, 0])
    for _ in range(rounds):
        distances, labels = torch.cdist(features, centroids).min(dim=1)
        counts = torch.bincount(labels, minlength=clusters)
        sums = torch.zeros_like(centroids).index_add_(0, labels, features)
        centroids = sums / counts.clamp_min(1)[:, None]
        empty = torch.nonzero(counts == 0)[:, 0]
        centroids[empty] = features[distances.topk(len(empty)).indices]
    return centroids
