"""The token separator: the mixture as a continuous prefix, then the codes of one track after the other.

Paper: Discrete Token Modeling for Multi-Stem Music Source Separation with Language Models (Lyu et al., 2026,
arXiv 2604.09371). The sequence is (eq. 2, 3), for two tracks of N steps each:

    hears   <mix> F_1 .. F_n   S c_1 .. c_N   S d_1 .. d_N
    writes                     c_1 .. c_N E   d_1 .. d_N E

A step is what is predicted at once: up to `codes_per_step` codes of a frame, acoustic or semantic ones. With
as many as the codec has levels it is the paper's c^a_t or c^s_t; with 1 all levels are flattened.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel

from ...tokenizer.acoustic_codec import AcousticCodec
from ...tokenizer.common.audio import SAMPLE_RATE_HZ
from ...tokenizer.common.checkpoint import Component
from ...tokenizer.common.errors import CheckpointError, ConfigError
from ...tokenizer.heads import STEMS
from ...tokenizer.layered import pack_codes
from ...tokenizer.semantic import SemanticTokenizer, SemanticTokenizerConfig
from ..hierarchical.stage import StreamConfig
from .conformer import FEATURE_RATE_HZ, Conformer, ConformerConfig

# What each track is made of; the tracks of a model share out the four stems.
TRACK_STEMS = {**{stem: (stem,) for stem in STEMS}, "accompaniment": STEMS[1:]}
POSITIONS = ("sequence", "time")


@dataclass(frozen=True, kw_only=True)
class TokenSeparatorConfig:
    """Settings of the separator; the defaults are the paper's."""

    tracks: tuple[str, ...] = STEMS  # in the order in which they are written
    codec: StreamConfig = field(default_factory=lambda: StreamConfig(levels=16))
    semantic: StreamConfig | None = None  # its levels: how many semantic codes stand in a frame of the codec
    codes_per_step: int = 16
    conformer: ConformerConfig = field(default_factory=ConformerConfig)
    features: SemanticTokenizerConfig | None = None  # frozen features in place of the Conformer (ablation A1)
    hidden_dim: int = 2048
    layers: int = 16
    heads: int = 16
    feed_forward_dim: int = 5504
    dropout: float = 0.1  # of inputs and of attention
    # Rotary positions: places in the sequence, as in the paper, or times, so that what sounds together is at
    # distance 0, whatever track it is of.
    positions: str = "sequence"
    mixture_at_steps: bool = False  # whether a step also carries the mixture at the time that it writes
    # Whether a step sees what was written before it. A small model copies that, right or wrong, since most
    # codes are those of the frame before; without it all steps are written at once, from the mixture alone.
    sees_past: bool = True
    is_parallel: bool = False  # all tracks at once, with heads of their own (ablation A3)
    window_seconds: float = 4.0  # that it is trained on, and writes at a time
    overlap_seconds: float = 1.0  # of neighbouring windows of a song, which change in its middle
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        unknown = [track for track in self.tracks if track not in TRACK_STEMS]
        if unknown:
            raise ConfigError(f"unknown track {unknown[0]!r}; known are {', '.join(TRACK_STEMS)}")
        if sorted(stem for track in self.tracks for stem in TRACK_STEMS[track]) != sorted(STEMS):
            raise ConfigError(
                f"tracks must share out {', '.join(STEMS)}, got {', '.join(self.tracks)}; give these "
                "four, or vocal and accompaniment"
            )
        if self.semantic is not None and self.semantic.rate_hz != self.codec.rate_hz:
            raise ConfigError(
                f"semantic codes must stand in the codec's frames, at {self.codec.rate_hz:g} Hz, got "
                f"{self.semantic.rate_hz:g} Hz"
            )
        if self.codes_per_step < 1 or self.layers < 1:
            raise ConfigError("codes_per_step and layers must be at least 1")
        if self.heads < 1 or self.hidden_dim % (2 * self.heads):
            raise ConfigError(
                f"hidden_dim {self.hidden_dim} does not divide into {self.heads} heads of even width"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if not 0 <= self.overlap_seconds <= self.window_seconds / 2:
            raise ConfigError(
                f"overlap_seconds must be in 0..window_seconds / 2, got {self.overlap_seconds:g} of "
                f"{self.window_seconds:g}"
            )
        if self.frames < 1:
            raise ConfigError(
                f"window_seconds must hold a frame of the codec, at least {1 / self.codec.rate_hz:g}"
            )

    @property
    def frames(self) -> int:
        """Frames of a window, of the codec."""
        return int(self.window_seconds * self.codec.rate_hz + 1e-6)

    @property
    def samples(self) -> int:
        """Samples of a window at 48 kHz."""
        return int(self.frames * SAMPLE_RATE_HZ / self.codec.rate_hz + 1e-6)

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """How many codes there are in each row of a frame: the codec's levels, then semantic ones."""
        sizes = (self.codec.codebook_size,) * self.codec.levels
        semantic = self.semantic
        return sizes if semantic is None else sizes + (semantic.codebook_size,) * semantic.levels

    @property
    def groups(self) -> tuple[range, ...]:
        """The rows of a frame that each of its steps writes, either acoustic or semantic ones."""
        levels, rows, most = self.codec.levels, len(self.row_sizes), self.codes_per_step
        parts = ((0, levels), (levels, rows))
        return tuple(
            range(low, min(low + most, stop)) for first, stop in parts for low in range(first, stop, most)
        )


class StepInputs(NamedTuple):
    """What the decoder hears at some steps, and where they stand."""

    inputs: Tensor  # [batch, steps, hidden_dim]
    positions: Tensor  # [steps] int64


class TokenSeparator(Component[TokenSeparatorConfig]):
    """Predicts each step of each track from the mixture, the tracks before and its own past."""

    KIND = "token_separator"
    CONFIG = TokenSeparatorConfig
    STORED = ("codec_fingerprint", "semantic_fingerprint")

    offsets: Tensor

    def __init__(self, config: TokenSeparatorConfig) -> None:
        super().__init__(config)
        self.codec_fingerprint: str | None = None  # of the tokenizers whose codes it learned
        self.semantic_fingerprint: str | None = None
        dim, tracks = config.hidden_dim, len(config.tracks)
        # Tracks are written one after the other, or as lanes of one sequence.
        self.lanes = tracks if config.is_parallel else 1
        self.sequences = tracks // self.lanes
        if config.features is None:
            self.encoder = Conformer(config.conformer)
            width = config.conformer.dim
        else:
            self.encoder = SemanticTokenizer(config.features).requires_grad_(False)
            width = self.encoder.encoder.dim
        self.adapter = nn.Linear(width, dim)
        self.mix = nn.Parameter(torch.randn(dim))  # <mix>
        self.start = nn.Parameter(torch.randn(dim))  # S
        self.track = nn.Parameter(torch.zeros(self.sequences, dim))
        sizes = torch.tensor(config.row_sizes)
        offsets = (sizes.repeat(self.lanes).cumsum(0) - sizes.repeat(self.lanes)).view(self.lanes, -1)
        self.register_buffer("offsets", offsets, persistent=False)  # [lanes, rows]
        self.code_embedding = nn.Embedding(self.lanes * int(sizes.sum()), dim)
        summed = self.lanes * max(len(group) for group in config.groups)
        nn.init.normal_(self.code_embedding.weight, std=summed**-0.5)
        # Of each step of a frame [lanes, rows, codes, dim]; the first one's last code is E, the end.
        self.heads = nn.ParameterList(
            torch.randn(self.lanes, len(group), config.row_sizes[group[0]] + (number == 0), dim)
            * (0.3 / dim**0.5)
            for number, group in enumerate(config.groups)
        )
        self.backbone = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                bos_token_id=None,
                eos_token_id=None,
                hidden_size=dim,
                intermediate_size=config.feed_forward_dim,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                attention_dropout=config.dropout,
                max_position_embeddings=2**16,
            )
        )
        self.backbone.set_input_embeddings(nn.Identity())  # the input comes embedded

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mix.device

    @property
    def steps(self) -> int:
        """Steps of a track in a window, without the end."""
        return self.config.frames * len(self.config.groups)

    def train(self, mode: bool = True) -> "TokenSeparator":
        """Set the mode; frozen features stay in eval mode."""
        super().train(mode)
        if isinstance(self.encoder, SemanticTokenizer):
            self.encoder.eval()
        return self

    def require_codec(self, codec: AcousticCodec) -> None:
        """Raise CheckpointError unless its codes are those of this codec."""
        stream = self.config.codec
        wanted = (stream.rate_hz, stream.codebook_size)
        if (
            wanted != (codec.frame_rate_hz, codec.codebook_size)
            or codec.codebooks < stream.levels
            or self.codec_fingerprint not in (None, codec.fingerprint)
        ):
            raise CheckpointError(
                f"this separator writes codes of the codec {self.codec_fingerprint} ({stream.levels} "
                f"codebooks of {stream.codebook_size} at {stream.rate_hz:g} Hz), got {codec.fingerprint} "
                f"({codec.codebooks} of {codec.codebook_size} at {codec.frame_rate_hz:g} Hz); give that one"
            )

    def hear(self, wave: Tensor) -> Tensor:
        """Mono mixtures [batch, samples] at 48 kHz -> features [batch, frames at 50 Hz, hidden_dim]."""
        if isinstance(self.encoder, SemanticTokenizer):
            with torch.autocast(wave.device.type, enabled=False):
                features = self.encoder.features(wave[:, None])
                features = (features - self.encoder.mean) / self.encoder.deviation
        else:
            features = self.encoder(wave)
        return self.adapter(features)

    def begin(self, features: Tensor) -> StepInputs:
        """The prefix: <mix>, then the mixture."""
        batch, frames, _ = features.shape
        inputs = torch.cat([self.mix.expand(batch, 1, -1), features], dim=1)
        if self.config.positions == "sequence":
            return StepInputs(inputs, torch.arange(frames + 1, device=inputs.device))
        ratio = self.config.codec.rate_hz * len(self.config.groups) / FEATURE_RATE_HZ
        times = (torch.arange(frames, device=inputs.device) * ratio + 1e-6).long()
        return StepInputs(inputs, functional.pad(times, (1, 0)))

    def enter(self, embedded: Tensor, features: Tensor, sequence: int, first: int) -> StepInputs:
        """Steps of a sequence from number `first` on, of S (step 0) or codes as embedded [batch, n, dim]."""
        steps = torch.arange(first, first + embedded.shape[1], device=embedded.device)
        inputs = embedded + self.track[sequence]
        if self.config.mixture_at_steps:
            ratio = FEATURE_RATE_HZ / (self.config.codec.rate_hz * len(self.config.groups))
            heard = (steps * ratio + 1e-6).long().clamp_max(features.shape[1] - 1)
            inputs = inputs + features[:, heard]
        if self.config.positions == "sequence":
            steps = steps + 1 + features.shape[1] + sequence * (self.steps + 1)
        return StepInputs(inputs, steps)

    def embed(self, codes: Tensor, group: int) -> Tensor:
        """Codes of a step [batch, lanes, rows of the group, ...] -> embeddings [batch, ..., dim]."""
        rows = self.config.groups[group]
        offsets = self.offsets[:, rows.start : rows.stop]
        index = codes + offsets.view(*offsets.shape, *[1] * (codes.ndim - 3))
        return self.code_embedding(index).sum(dim=(1, 2))

    def hidden_states(self, steps: StepInputs) -> Tensor:
        """States [batch, steps, hidden_dim]; a step sees those up to itself."""
        # The layers are called one by one because LlamaModel.forward takes positions that start again for
        # packed sequences, which it would hide from each other.
        hidden = functional.dropout(steps.inputs, self.config.dropout, self.training)
        rotary = self.backbone.rotary_emb(hidden, steps.positions[None])
        for layer in self.backbone.layers:
            if self.config.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, None, position_embeddings=rotary, use_reentrant=False)
            else:
                hidden = layer(hidden, None, position_embeddings=rotary)
            assert isinstance(hidden, Tensor)
        return self.backbone.norm(hidden)

    def forward(self, wave: Tensor, codes: Tensor) -> list[Tensor]:
        """Logits under teacher forcing, of each step of a frame [batch, tracks, rows, frames, codes].

        wave: mono mixtures [batch, samples] of one window; codes [batch, tracks, rows, frames] of its tracks.
        The first one has one frame and one code more: E, the last code, belongs into that frame.
        """
        features, groups = self.hear(wave), self.config.groups
        lanes = codes.unflatten(1, (self.sequences, self.lanes))
        parts = [self.begin(features)]
        for sequence in range(self.sequences):
            own = lanes[:, sequence]  # [batch, lanes, rows, frames]
            written = [self.embed(own[:, :, rows.start : rows.stop], k) for k, rows in enumerate(groups)]
            embedded = torch.stack(written, dim=2).flatten(1, 2)  # [batch, steps, dim]
            if not self.config.sees_past:
                embedded = 0 * embedded  # still part of the graph: DDP waits for a gradient of every weight
            start = self.start.expand(len(wave), 1, -1)
            parts.append(self.enter(torch.cat([start, embedded], dim=1), features, sequence, 0))
        inputs, positions = zip(*parts, strict=True)
        hidden = self.hidden_states(StepInputs(torch.cat(inputs, dim=1), torch.cat(positions)))
        hidden = hidden[:, 1 + features.shape[1] :].unflatten(1, (self.sequences, self.steps + 1))
        return [self.predict(hidden[:, :, k :: len(groups)], k) for k in range(len(groups))]

    def predict(self, hidden: Tensor, group: int) -> Tensor:
        """States [batch, sequences, n, dim] at steps of a kind -> logits [batch, tracks, rows, n, codes]."""
        head = self.heads[group]
        return torch.einsum("bqnd,prcd->bqprnc", hidden, head.to(hidden.dtype)).flatten(1, 2)


class TokenSeparatorObjective(nn.Module):
    """Weighted cross-entropy of the tracks' codes under teacher forcing; codec and features are frozen."""

    def __init__(
        self,
        separator: TokenSeparator,
        codec: AcousticCodec,
        semantic: SemanticTokenizer | None = None,
        *,
        level_weights: tuple[float, ...] = (2.0, 1.0),
        label_smoothing: float = 0.1,
    ) -> None:
        """level_weights: of the first levels of codec and of semantic codes; the last one goes on."""
        super().__init__()
        self.separator, self.label_smoothing = separator, label_smoothing
        self.codec, self.semantic = codec.requires_grad_(False), semantic
        if semantic is not None:
            semantic.requires_grad_(False)
        config = separator.config
        counts = (config.codec.levels, 0 if config.semantic is None else config.semantic.levels)
        self.weights = [
            weight for count in counts for weight in (*level_weights, *[level_weights[-1]] * count)[:count]
        ]

    def train(self, mode: bool = True) -> "TokenSeparatorObjective":
        """Set the mode; what makes the codes stays in eval mode."""
        super().train(mode)
        self.codec.eval()
        if self.semantic is not None:
            self.semantic.eval()
        return self

    @torch.no_grad()
    def encode(self, tracks: Tensor) -> Tensor:
        """Mono tracks [batch, tracks, samples] of a window -> codes [batch, tracks, rows, frames]."""
        config = self.separator.config
        waves = tracks.flatten(0, 1)[:, None]
        with torch.autocast(waves.device.type, enabled=False):
            codes = self.codec.encode(waves)[:, : config.codec.levels, : config.frames]
            if self.semantic is not None and config.semantic is not None:
                rates = {"semantic_hz": self.semantic.frame_rate_hz, "codec_hz": config.codec.rate_hz}
                pairs = zip(self.semantic.encode(waves), codes, strict=True)
                packed = torch.stack([pack_codes(own, acoustic, **rates) for own, acoustic in pairs])
                codes = packed.roll(-config.semantic.levels, dims=1)  # acoustic ones first
        return codes.unflatten(0, tracks.shape[:2])

    def nats(self, mixtures: Tensor, codes: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """Mean nats of codes [batch, tracks, rows, frames] by track and row, and of E by track."""
        rows, ends = [], mixtures.new_zeros(())
        for number, logits in enumerate(self.separator(mixtures, codes)):
            group = self.separator.config.groups[number]
            target = codes[:, :, group.start : group.stop]
            if number == 0:
                target = functional.pad(target, (0, 1), value=logits.shape[-1] - 1)
            found = functional.cross_entropy(
                logits.float().flatten(0, 3), target.flatten(), reduction="none", label_smoothing=smoothing
            ).view(target.shape)
            if number == 0:
                found, ends = found[..., :-1], found[..., -1].mean()
            rows.append(found.mean(dim=(0, 3)))
        return torch.cat(rows, dim=1), ends

    def forward(self, tracks: Tensor) -> dict[str, Tensor]:
        """Mono tracks [batch, tracks, samples] that sum to the mixtures -> named losses in nats per code.

        "total" is what is minimized; TRACK: its part; "level0" etc.: of a row of the frames; "end": of E.
        """
        codes = self.encode(tracks)
        nats, end = self.nats(tracks.sum(dim=1), codes, self.label_smoothing)
        weights = nats.new_tensor(self.weights)
        by_track = (nats * weights).sum(dim=1) / weights.sum()
        steps = self.separator.config.frames
        total = (steps * by_track.mean() + end) / (steps + 1)
        named = dict(zip(self.separator.config.tracks, by_track, strict=True))
        levels = {f"level{k}": each for k, each in enumerate(nats.mean(dim=0))}
        return {"total": total, "end": end, **named, **levels}
