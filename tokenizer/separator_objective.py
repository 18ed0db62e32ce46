"""What the mask estimator minimizes: the signal-to-noise ratio of masked mixtures, in the STFT domain."""

from torch import Tensor, nn

from .heads import STEMS
from .level import level_gain
from .separator import MaskSeparator

# Noise this far below the mixture counts as none (30 dB), so that a silent stem has a finite ratio.
FLOOR = 1e-3


class SeparationObjective(nn.Module):
    """Negative thresholded signal-to-noise ratio in dB (Wisdom et al., 2020, eq. 2); the tokenizer is frozen.

    The squared error of complex spectra asks for the mask whose stem has the right level on average; their
    absolute error, whose optimum is a median, turns down whatever is often masked by others, the voice above
    all. A ratio per cut weighs quiet stems like loud ones.
    """

    def __init__(self, separator: MaskSeparator) -> None:
        super().__init__()
        self.separator = separator
        separator.tokenizer.requires_grad_(False)

    def forward(self, stems: Tensor) -> dict[str, Tensor]:
        """stems [batch, 4, samples] that sum to the mixtures -> named losses in dB."""
        wave = stems.sum(dim=1)
        gain = level_gain(wave)
        masks, mixture = self.separator.masks(wave * gain)
        truth = self.separator.stft(stems * gain[:, None])  # [batch, 4, bins, frames]
        noise = power(masks * mixture[:, None] - truth)
        floor = FLOOR * power(mixture)[:, None] + 1e-8
        ratio = 10 * ((noise + floor) / (power(truth) + floor)).log10()  # [batch, 4]
        losses = {stem: ratio[:, index].mean() for index, stem in enumerate(STEMS)}
        return {"total": ratio.mean(), **losses}


def power(spectrum: Tensor) -> Tensor:
    """Return the mean square magnitude of spectra [..., bins, frames] as [...]."""
    return (spectrum.real.square() + spectrum.imag.square()).mean(dim=(-2, -1))
