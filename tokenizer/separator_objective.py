"""What the mask estimator minimizes: the distance of masked mixtures to the stems, in the STFT domain."""

from torch import Tensor, nn

from .heads import STEMS
from .level import level_gain
from .separator import MaskSeparator


class SeparationObjective(nn.Module):
    """L1 distance of complex spectra over the mixture's mean magnitude; the tokenizer is frozen.

    A real mask cannot turn phases, so this asks for the mask that comes nearest to the stem (the truncated
    phase-sensitive mask of Erdogan et al., 2015), unlike the ideal ratio masks of the head (P eq. 3).
    """

    def __init__(self, separator: MaskSeparator) -> None:
        super().__init__()
        self.separator = separator
        separator.tokenizer.requires_grad_(False)

    def forward(self, stems: Tensor) -> dict[str, Tensor]:
        """stems [batch, 4, samples] that sum to the mixtures -> named losses."""
        wave = stems.sum(dim=1)
        gain = level_gain(wave)
        masks, mixture = self.separator.masks(wave * gain)
        truth = self.separator.stft(stems * gain[:, None])  # [batch, 4, bins, frames]
        distance = (masks * mixture[:, None] - truth).abs().mean(dim=(2, 3))  # [batch, 4]
        distance = distance / mixture.abs().mean(dim=(1, 2))[:, None].clamp_min(1e-6)
        losses = {stem: distance[:, index].mean() for index, stem in enumerate(STEMS)}
        return {"total": distance.mean(), **losses}
