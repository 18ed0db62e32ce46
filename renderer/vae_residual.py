"""ConvNeXt branches over time that start by adding nothing."""

from torch import Tensor, nn


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then two pointwise layers (Liu et al. 2022; 1-D as in Vocos)."""

    def __init__(self, dim: int, kernel_frames: int, expansion: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel_frames, padding=kernel_frames // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.activation = nn.GELU()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape."""
        context = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self.contract(self.activation(self.expand(self.norm(context))))


class ResidualBranch(nn.Module):
    """Input -> a few ConvNeXt blocks -> a correction that is zero before training."""

    def __init__(
        self, inputs: int, outputs: int, *, dim: int, blocks: int, kernel_frames: int, expansion: int = 3
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, dim)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim, kernel_frames, expansion) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        self.leave = nn.Linear(dim, outputs)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.reach_frames = blocks * (kernel_frames // 2)

    def forward(self, values: Tensor) -> Tensor:
        """values [batch, frames, inputs] -> correction [batch, frames, outputs]."""
        return self.leave(self.norm(self.blocks(self.enter(values))))
