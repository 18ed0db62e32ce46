"""Frozen code vectors of any tokenizer as a decoder's condition (P B.3.1: the matched-decoder protocol)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from duotok.tokenizer.common.checkpoint import Component
from duotok.tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CodeVectorsConfig:
    """Shape of a tokenizer's codes and vectors."""

    codebooks: int = 1  # whose vectors add up, as those of residual quantizers do
    codebook_size: int = 1024
    dim: int = 64  # of one vector
    per_frame: int = 1  # codec frames inside one frame of 40 ms

    def __post_init__(self) -> None:
        for name in ("codebooks", "codebook_size", "dim", "per_frame"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


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
        config = CodeVectorsConfig(codebooks=codebooks, codebook_size=size, dim=dim, per_frame=per_frame)
        vectors = cls(config)
        vectors.tables.copy_(tables)
        return vectors.eval()

    @property
    def dim(self) -> int:
        """Width of the features: the vectors of a frame's codec frames side by side."""
        return self.config.per_frame * self.config.dim

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame of 40 ms."""
        return self.config.per_frame * self.config.codebooks

    def features(self, codes: Tensor, track: str) -> Tensor:
        """Return features [batch, frames25, dim] of codes [batch, frames25, per_frame * codebooks].

        The codes of one codec frame lie side by side; the track makes no difference.
        """
        if codes.ndim != 3 or codes.shape[2] != self.codes_per_frame:
            raise ConfigError(
                f"codes must be [batch, frames, {self.codes_per_frame}], got {tuple(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ConfigError(
                f"codes must be from 0 to {self.config.codebook_size - 1}, got {int(codes.min())} to "
                f"{int(codes.max())}"
            )
        by_codebook = codes.unflatten(2, (self.config.per_frame, self.config.codebooks)).unbind(dim=3)
        # Each term is [batch, frames25, per_frame, dim].
        terms = (
            functional.embedding(own, table) for own, table in zip(by_codebook, self.tables, strict=True)
        )
        return torch.stack(list(terms)).sum(dim=0).flatten(2)
