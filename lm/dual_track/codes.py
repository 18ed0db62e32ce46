"""One track's codes at the input and output of the language model, anchored on the tokenizer's vectors."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tokenizer.common.errors import ConfigError


class TrackCodes(nn.Module):
    """Embedding table and prediction head of one track.

    Both start from the tokenizer's code vectors, so that codes that sound alike begin alike: embedding =
    linear(vector) + residual, logits = linear(hidden) . vector + residual, the residuals starting at zero.
    The code after the last one is PAD: "nothing here", learned, never predicted.
    """

    vectors: Tensor

    def __init__(self, codes: int, code_dim: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.codes = codes
        self.register_buffer("vectors", torch.zeros(codes, code_dim))
        self.anchor_in = nn.Linear(code_dim, embedding_dim, bias=False)
        self.residual_in = nn.Embedding(codes + 1, embedding_dim)
        self.anchor_out = nn.Linear(hidden_dim, code_dim, bias=False)
        self.residual_out = nn.Linear(hidden_dim, codes)
        nn.init.normal_(self.anchor_in.weight, std=code_dim**-0.5)
        nn.init.zeros_(self.residual_in.weight)
        nn.init.normal_(self.residual_in.weight[codes:])
        near_uniform = 0.3 * (hidden_dim * code_dim) ** -0.5
        nn.init.normal_(self.anchor_out.weight, std=near_uniform)
        nn.init.zeros_(self.residual_out.weight)
        nn.init.zeros_(self.residual_out.bias)
        self.anchor_on(torch.randn(codes, code_dim))

    @property
    def pad(self) -> int:
        """Index of PAD."""
        return self.codes

    @torch.no_grad()
    def anchor_on(self, vectors: Tensor) -> None:
        """Take the tokenizer's code vectors [codes, code_dim], brought to zero mean and unit deviation."""
        if vectors.shape != self.vectors.shape:
            raise ConfigError(
                f"the code vectors are {tuple(vectors.shape)}, the language model expects "
                f"{tuple(self.vectors.shape)}; build it for this tokenizer"
            )
        centred = vectors.float() - vectors.float().mean(dim=0)
        self.vectors.copy_(centred / centred.std().clamp_min(1e-6))

    def embed(self, codes: Tensor) -> Tensor:
        """Return embeddings [..., embedding_dim] of codes [...] in 0..codes, PAD included."""
        padded = functional.pad(self.vectors, (0, 0, 0, 1))  # PAD has no vector of its own
        return self.anchor_in(functional.embedding(codes, padded)) + self.residual_in(codes)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., codes] of hidden states [..., hidden_dim]."""
        return self.anchor_out(hidden) @ self.vectors.T.to(hidden.dtype) + self.residual_out(hidden)
