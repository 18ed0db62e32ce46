"""Latent diffusion decoder: tokenizer features at 25 Hz -> autoencoder latents at 50 Hz (P 3.4, C.4).

Beyond the paper it can be told the chart of what it plays, see `chart`, and keeps to the harmony that it
expects, see `foretold_chroma`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..tokenizer.blocks import FeedForward, RMSNorm, RotaryPositions, attend_near, rotate
from ..tokenizer.common.checkpoint import Component
from ..tokenizer.common.errors import CheckpointError, ConfigError
from .chart import COLUMNS as CHART_COLUMNS
from .chart import UNKNOWN, ChartEmbedding, check_chart
from .diffusion_path import OBJECTIVES, DiffusionPath, Solver
from .foretold_chroma import ChromaHead, follow_chroma

MODULATIONS = 6  # shift, scale and gate of the attention, then of the feed-forward


class LocalAttention(nn.Module):
    """Self-attention in which a token sees `window` tokens to each side; the cost is linear in the length."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.query_norm = RMSNorm(dim // heads)
        self.key_norm = RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [batch, tokens, dim] -> the same shape."""
        heads = "batch tokens (three heads dim) -> three batch heads tokens dim"
        query, key, value = rearrange(self.qkv(hidden), heads, three=3, heads=self.heads)
        query = rotate(self.query_norm(query), *rotary).to(value.dtype)
        key = rotate(self.key_norm(key), *rotary).to(value.dtype)
        mixed = attend_near(query, key, value, self.window)
        return self.out(rearrange(mixed, "batch heads tokens dim -> batch tokens (heads dim)"))


class ModulatedBlock(nn.Module):
    """Pre-norm block whose norms and branches are modulated by one vector shared by all blocks.

    The shared vector plus a learned table per block is PixArt-alpha's adaLN-single (arXiv 2310.00426, 2.3):
    DiT's quality without a third of its weights in modulation matrices.
    """

    def __init__(self, dim: int, heads: int, window: int, feed_forward_dim: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, elementwise_affine=False)
        self.attention = LocalAttention(dim, heads, window)
        self.feed_forward_norm = RMSNorm(dim, elementwise_affine=False)
        self.feed_forward = FeedForward(dim, feed_forward_dim)
        self.table = nn.Parameter(torch.zeros(MODULATIONS, dim))

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], modulation: Tensor) -> Tensor:
        """hidden [batch, tokens, dim], modulation [batch or 1, 6, dim] -> [batch, tokens, dim]."""
        # Each part is [batch, 1, dim]; a modulation of zeros is an ordinary block.
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (modulation + self.table).split(1, dim=1)
        attended = self.attention(self.attention_norm(hidden) * (1 + scale_a) + shift_a, rotary)
        hidden = hidden + (1 + gate_a) * attended
        fed = self.feed_forward(self.feed_forward_norm(hidden) * (1 + scale_f) + shift_f)
        return hidden + (1 + gate_f) * fed


class ModulatedTransformer(nn.Module):
    """A stack of blocks; reaches blocks * window tokens to each side."""

    def __init__(self, *, dim: int, heads: int, window: int, feed_forward_dim: int, blocks: int) -> None:
        super().__init__()
        self.rotary = RotaryPositions(dim // heads)
        stack = [ModulatedBlock(dim, heads, window, feed_forward_dim) for _ in range(blocks)]
        self.blocks = nn.ModuleList(stack)
        for block in stack:
            # Branches start small, so that a deep stack starts near the identity.
            for linear in (block.attention.out, block.feed_forward.down):
                nn.init.normal_(linear.weight, std=0.02 / blocks**0.5)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """hidden [batch, tokens, dim], modulation [batch or 1, 6, dim] -> [batch, tokens, dim]."""
        rotary = self.rotary(hidden.shape[1])
        for block in self.blocks:
            hidden = block(hidden, rotary, modulation)
        return hidden


class TimeEmbedding(nn.Module):
    """Diffusion time in 0..1 -> one modulation vector (sinusoids, then two layers)."""

    SINUSOIDS = 128

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        exponents = torch.arange(self.SINUSOIDS // 2, dtype=torch.float32) / (self.SINUSOIDS // 2)
        self.register_buffer("frequencies", 1000.0 * 10_000.0**-exponents, persistent=False)
        out = nn.Linear(dim, MODULATIONS * dim)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.layers = nn.Sequential(nn.Linear(self.SINUSOIDS, dim), nn.SiLU(), out)

    def forward(self, time: Tensor) -> Tensor:
        """time [batch] -> modulation [batch, 6, dim]."""
        angles = time[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=-1)).unflatten(1, (MODULATIONS, -1))


_CHART_GUIDANCE = 3.0  # chosen on validation songs: docs/renderer.md
LATENTS_PER_FEATURE = 2  # 50 Hz over 25 Hz
DEVIATION_RANGE = (0.1, 1.5)  # of the regression's residual, in units of the latents' deviation


@dataclass(frozen=True, kw_only=True)
class DiffusionDecoderConfig:
    """Settings of one track's decoder; the defaults are about the paper's 400M (P C.4)."""

    feature_dim: int = 1024  # width of the tokenizer's features
    latent_dim: int = 64
    dim: int = 1024
    heads: int = 16
    feed_forward_dim: int = 3584
    blocks: int = 22  # run once per solver step
    condition_blocks: int = 4  # run once per window
    patch_frames: int = 1  # latent frames per token of the step blocks: 1 (50 Hz) or 2 (25 Hz)
    window_seconds: float = 5.0  # attention to each side
    objective: str = "flow"  # flow (straight paths) or v (DPM-Solver++)
    styles: tuple[str, ...] = ()  # that a chart's STYLE counts; none: it can be told no chart
    foretells_chroma: bool = False  # of the latents that it draws

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ConfigError(f"dim {self.dim} must divide into {self.heads} heads of even width")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.patch_frames not in (1, LATENTS_PER_FEATURE):
            raise ConfigError(f"patch_frames must be 1 or 2, got {self.patch_frames}")
        if self.window_seconds < 0.04:
            raise ConfigError(f"window_seconds must be at least 0.04, got {self.window_seconds}")
        for name in ("feature_dim", "latent_dim", "feed_forward_dim", "blocks", "condition_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class Condition(NamedTuple):
    """What the features say, computed once per window."""

    hidden: Tensor  # [batch, tokens, dim], added to the noisy tokens
    mean: Tensor  # [batch, latent_dim, frames], regression of the normalized latents
    deviation: Tensor  # [batch, latent_dim, frames], expected deviation around it
    chroma: Tensor | None  # [batch, frames, 12] that the latents will have, up to its level and scale


class Known(NamedTuple):
    """Clean normalized latents of the frames that are given."""

    latents: Tensor  # [batch, latent_dim, frames], zero where unknown
    mask: Tensor  # [batch, 1, frames], 1 where known


class DiffusionDecoder(Component[DiffusionDecoderConfig]):
    """Diffusion Transformer over latents, conditioned on tokenizer features and on known first frames."""

    KIND = "diffusion_decoder"
    CONFIG = DiffusionDecoderConfig
    STORED = ("track", "tokenizer_fingerprint", "vae_fingerprint")

    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self, config: DiffusionDecoderConfig) -> None:
        super().__init__(config)
        self.track: str | None = None  # whose latents it learned; None where nobody wrote it down
        self.tokenizer_fingerprint: str | None = None
        self.vae_fingerprint: str | None = None
        self.path = DiffusionPath(config.objective)
        dim, channels, patch = config.dim, config.latent_dim, config.patch_frames
        self.register_buffer("latent_mean", torch.zeros(channels, 1))
        self.register_buffer("latent_deviation", torch.ones(channels, 1))
        self.null_features = nn.Parameter(torch.zeros(config.feature_dim))
        self.feature_norm = nn.LayerNorm(config.feature_dim)
        self.feature_in = nn.Linear(config.feature_dim, dim)
        self.chart = ChartEmbedding(dim, config.styles) if config.styles else None
        self.condition_blocks = self._transformer(config.condition_blocks, tokens_per_second=25)
        self.condition_norm = RMSNorm(dim)
        self.condition_out = nn.Linear(dim, dim * LATENTS_PER_FEATURE // patch)
        self.regression_out = _zero_linear(dim, 2 * channels * LATENTS_PER_FEATURE)
        self.chroma_out = ChromaHead(dim, LATENTS_PER_FEATURE) if config.foretells_chroma else None
        # Noisy latents, known latents, the mask, and the regression's mean enter side by side.
        self.latents_in = nn.Linear((3 * channels + 1) * patch, dim)
        self.time = TimeEmbedding(dim)
        self.blocks = self._transformer(config.blocks, tokens_per_second=50 // patch)
        self.out_norm = RMSNorm(dim)
        self.latents_out = _zero_linear(dim, channels * patch)

    def _transformer(self, blocks: int, tokens_per_second: int) -> ModulatedTransformer:
        c, window = self.config, max(1, round(self.config.window_seconds * tokens_per_second))
        return ModulatedTransformer(
            dim=c.dim, heads=c.heads, window=window, feed_forward_dim=c.feed_forward_dim, blocks=blocks
        )

    def encode_condition(
        self, features: Tensor, dropped: Tensor | None = None, chart: Tensor | None = None
    ) -> Condition:
        """features [batch, frames25, feature_dim] -> Condition.

        chart [batch, frames25, 5]: None where nothing is known, and ignored by a decoder that can be told
        none. dropped [batch] bool: whose features and chart are not seen.
        """
        hidden = self.feature_norm(features)
        if dropped is not None:
            hidden = torch.where(dropped[:, None, None], self.null_features.to(hidden.dtype), hidden)
        hidden = self.feature_in(hidden)
        if self.chart is not None:
            if chart is None:
                chart = torch.full((1, 1, CHART_COLUMNS), UNKNOWN, device=features.device)
            if dropped is not None:
                chart = torch.where(dropped[:, None, None], UNKNOWN, chart)
            hidden = hidden + self.chart(chart)
        hidden = self.condition_blocks(hidden, hidden.new_zeros(1, MODULATIONS, self.config.dim))
        hidden = self.condition_norm(hidden)
        mean, deviation = self._regress(hidden)
        chroma = None if self.chroma_out is None else self.chroma_out(hidden).float()
        hidden = rearrange(self.condition_out(hidden), "b t (r d) -> b (t r) d", d=self.config.dim)
        return Condition(hidden=hidden, mean=mean, deviation=deviation, chroma=chroma)

    def _regress(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [batch, frames25, dim] -> mean and deviation, each [batch, latent_dim, 2 * frames25]."""
        both = rearrange(self.regression_out(hidden).float(), "b t (r c) -> b c (t r)", r=LATENTS_PER_FEATURE)
        mean, log_deviation = both.chunk(2, dim=1)
        low, high = DEVIATION_RANGE
        return mean, log_deviation.clamp(math.log(low), math.log(high)).exp()

    def forward(self, noisy: Tensor, time: Tensor, condition: Condition, known: Known) -> Tensor:
        """Predict the path's target of noisy [batch, latent_dim, frames], normalized, at time [batch]."""
        # The regression has its own loss; the diffusion loss must not bend it.
        mean, deviation = condition.mean.detach(), condition.deviation.detach()
        channels, patch = torch.cat([noisy, known.latents, known.mask, mean], dim=1), self.config.patch_frames
        tokens = rearrange(channels, "b c (tokens p) -> b tokens (p c)", p=patch)
        hidden = self.blocks(self.latents_in(tokens) + condition.hidden, self.time(time))
        tokens = self.latents_out(self.out_norm(hidden)).float()
        output = rearrange(tokens, "b tokens (p c) -> b c (tokens p)", p=patch)
        offset, scale = self.path.guess(noisy, mean, deviation, time[:, None, None])
        return offset + scale * output

    def normalize(self, latents: Tensor) -> Tensor:
        """Bring latents [batch, latent_dim, frames] to zero mean and unit deviation per channel."""
        return (latents - self.latent_mean) / self.latent_deviation

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`."""
        return latents * self.latent_deviation + self.latent_mean

    @torch.no_grad()
    def sample(
        self,
        features: Tensor,
        *,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        chart: Tensor | None = None,
        known_latents: Tensor | None = None,
        latents_after: Tensor | None = None,
        hear: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return latents [batch, latent_dim, 2 * frames25] for features [batch, frames25, feature_dim].

        chart [batch, frames25, 5]: see `chart`; None: nothing is known. It is followed as if it said
        three times as much, by the rule of guidance.
        guidance (classifier-free): 1 = none, else unconditional + guidance * (conditional - unconditional).
        generator: of the CPU, so that all devices draw the same.
        known_latents [batch, latent_dim, k]: of the first k frames, given back as they are. latents_after:
        the same of the last frames, held while the rest is drawn (RePaint, arXiv 2201.09865); the network,
        which has learned to go on from a start, is not told that they are known.
        hear: gives the chroma [batch, frames, 12] of latents, with gradients; what is drawn is then moved to
        the chroma that is foretold, by a decoder that foretells one.
        """
        walk = Solver(self.config.objective, steps)
        if features.ndim != 3 or features.shape[1] < 1 or features.shape[2] != self.config.feature_dim:
            raise ConfigError(
                f"the decoder needs features [batch, frames of 40 ms, {self.config.feature_dim}], at least "
                f"one frame; got {tuple(features.shape)}"
            )
        batch, frames25, _ = features.shape
        if self.chart is None:
            chart = None
        heard = [(chart, False)]  # the chart of each run of the network, and whether it hears no features
        if chart is not None:
            check_chart(chart, frames25, len(self.config.styles))
            heard.append((None, False))
        if guidance != 1:
            heard.append((None, True))
        shape = (batch, self.config.latent_dim, frames25 * LATENTS_PER_FEATURE)
        told = self._known(known_latents, None, shape, features)
        known = self._known(known_latents, latents_after, shape, features)
        copies, unknown = len(heard), torch.full((batch, frames25, CHART_COLUMNS), UNKNOWN)
        charts = torch.cat([unknown if each is None else each for each, _ in heard]).to(features.device)
        dropped = torch.tensor([is_blind for _, is_blind in heard], device=features.device)
        condition = self.encode_condition(
            features.repeat(copies, 1, 1), dropped.repeat_interleave(batch), charts
        )
        told_copies = Known(*(part.repeat(copies, 1, 1) for part in told))
        mean, deviation = (part[:batch] for part in (condition.mean, condition.deviation))
        weights = [guidance if is_blind else _CHART_GUIDANCE for _, is_blind in heard[1:]]
        noise = torch.randn(shape, generator=generator).to(features)
        latents = noise
        for run, time in enumerate(walk.times.to(features)):
            time = time.expand(batch)
            held = self.path.mix(known.latents, noise, time[:, None, None])
            latents = torch.where(known.mask > 0, held, latents)
            target = self(latents.repeat(copies, 1, 1), time.repeat(copies), condition, told_copies)
            target, *others = target.chunk(copies)
            for other, weight in zip(others, weights, strict=True):
                target = other + weight * (target - other)
            latents = walk.step(target, run, latents, mean, deviation)
        if condition.chroma is not None and hear is not None:
            chroma = condition.chroma[:batch]
            latents = follow_chroma(latents, chroma, lambda x: hear(self.denormalize(x)), 1 - known.mask)
        latents = self.denormalize(latents)
        if known_latents is not None:
            latents[:, :, : known_latents.shape[2]] = known_latents
        if latents_after is not None:
            latents[:, :, shape[2] - latents_after.shape[2] :] = latents_after
        return latents

    def _known(
        self, first: Tensor | None, last: Tensor | None, shape: tuple[int, int, int], like: Tensor
    ) -> Known:
        clean, mask = like.new_zeros(shape), like.new_zeros(shape[0], 1, shape[2])
        for name, latents in (("known_latents", first), ("latents_after", last)):
            if latents is not None:
                count = latents.shape[2]
                if latents.shape[:2] != shape[:2] or count > shape[2]:
                    raise ConfigError(f"{name} {tuple(latents.shape)} do not fit into latents {shape}")
                place = slice(0, count) if name == "known_latents" else slice(shape[2] - count, shape[2])
                clean[:, :, place] = self.normalize(latents)
                mask[:, :, place] = 1
        return Known(latents=clean, mask=mask)

    def require(
        self, *, tokenizer: str | None = None, vae: str | None = None, track: str | None = None
    ) -> None:
        """Raise CheckpointError unless this decoder was trained on this track and on these fingerprints."""
        if track is not None and self.track is not None and track != self.track:
            raise CheckpointError(
                f"a diffusion decoder of the {track} is needed, the one given was trained on the {self.track}"
            )
        pairs = (("tokenizer", tokenizer, self.tokenizer_fingerprint), ("VAE", vae, self.vae_fingerprint))
        for name, given, own in pairs:
            if given is not None and own is not None and given != own:
                raise CheckpointError(
                    f"the diffusion decoder was trained on the {name} {own}, but the {name} given is "
                    f"{given}; use the parts of one bundle"
                )


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts by saying nothing."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
