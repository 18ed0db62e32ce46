"""Masks of stems over a time-frequency grid: a U-Net (Ronneberger et al., 2015; Jansson et al., 2017)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDEST = 128  # channels


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each cell, so that a cell's value does not hang on how long a song is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels)

    def forward(self, grid: Tensor) -> Tensor:
        """grid [batch, channels, frames, bands] -> the same shape."""
        return self.norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scale(nn.Module):
    """One halving of the grid on the way down and its doubling on the way up."""

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(fine, coarse, kernel_size=5, stride=2, padding=2)
        self.down_norm = ChannelNorm(coarse)
        self.up = nn.ConvTranspose2d(coarse, fine, kernel_size=4, stride=2, padding=1)
        self.join = nn.Conv2d(2 * fine, fine, kernel_size=3, padding=1)
        self.join_norm = ChannelNorm(fine)

    def descend(self, grid: Tensor) -> Tensor:
        """[batch, fine, frames, bands] -> [batch, coarse, frames / 2, bands / 2]."""
        return functional.gelu(self.down_norm(self.down(grid)))

    def ascend(self, grid: Tensor, skipped: Tensor) -> Tensor:
        """[batch, coarse, frames / 2, bands / 2] and what `descend` was given -> the shape of the latter."""
        joined = self.join(torch.cat([self.up(grid), skipped], dim=1))
        return skipped + functional.gelu(self.join_norm(joined))


class MaskUNet(nn.Module):
    """Grids in, logits per stem out; convolutions see a harmonic alike wherever it lies.

    What depends on the place, as that a bass plays low, is learned per band.
    """

    def __init__(self, inputs: int, outputs: int, bands: int, channels: int, scales: int) -> None:
        super().__init__()
        self.period = 2**scales  # frames and bands must be multiples of it
        widths = [min(channels * 2**number, max(channels, WIDEST)) for number in range(scales + 1)]
        self.into = nn.Conv2d(inputs, channels, kernel_size=3, padding=1)
        self.scales = nn.ModuleList(
            Scale(fine, coarse) for fine, coarse in zip(widths[:-1], widths[1:], strict=True)
        )
        self.out = nn.Conv2d(channels, outputs, kernel_size=1, bias=False)
        nn.init.zeros_(self.out.weight)
        self.place_in = nn.Parameter(torch.zeros(channels, 1, bands))
        self.place_out = nn.Parameter(torch.zeros(outputs, 1, bands))

    @property
    def reach(self) -> int:
        """Frames to each side that a cell depends on."""
        # Per scale, in frames of its finer grid: 2 down, 2 coarse ones up, 1 of the join.
        return 1 + sum(7 * 2**number for number in range(len(self.scales)))

    def forward(self, grid: Tensor) -> Tensor:
        """grid [batch, inputs, frames, bands] -> [batch, outputs, frames, bands]."""
        hidden = self.into(grid.contiguous(memory_format=torch.channels_last)) + self.place_in
        skipped = []
        for scale in self.scales:
            assert isinstance(scale, Scale)
            skipped.append(hidden)
            hidden = scale.descend(hidden)
        for scale in reversed(self.scales):
            assert isinstance(scale, Scale)
            hidden = scale.ascend(hidden, skipped.pop())
        return self.out(hidden) + self.place_out
