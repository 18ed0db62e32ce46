"""Plain vector quantization: a learned codebook, what SimVQ is compared with."""

import torch
from torch import nn

from .simvq import VectorQuantizer


class PlainVQ(VectorQuantizer):
    """Quantize by a codebook whose entries are learned one by one (VQ-VAE, arXiv 1711.00937, eq. 3).

    Only entries that were chosen get a gradient from the codebook and commitment losses, so that entries can
    die; SimVQ's one map moves them all. `fit_to` gives the same k-means start as SimVQ's.
    """

    def __init__(self, codebook_size: int, code_dim: int, commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        self.basis = nn.Parameter(torch.randn(codebook_size, code_dim))
