"""What the waveform autoencoder and its adversary learn, in one loss and one optimizer step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from duotok.recipes.renderer.adversarial_losses import (
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from duotok.recipes.renderer.waveform_losses import WaveformLossConfig, WaveformLosses
from duotok.renderer.discriminators import DiscriminatorConfig, Discriminators
from duotok.renderer.vae_oobleck import OobleckVAE
from duotok.tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """Settings of the adversary; the weights are Stable Audio's."""

    start_step: int = 0  # optimizer steps without it
    adversarial: float = 0.1  # weight of the autoencoder's loss against the discriminators
    feature_matching: float = 5.0
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        for name in ("start_step", "adversarial", "feature_matching"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"adversary.{name} must not be negative, got {getattr(self, name)}")


class WaveformObjective(nn.Module):
    """Losses of the autoencoder plus those of its discriminators; neither's reach the other's weights."""

    def __init__(self, vae: OobleckVAE, loss: WaveformLossConfig, adversary: AdversaryConfig) -> None:
        super().__init__()
        self.vae, self.loss, self.adversary = vae, loss, adversary
        self.reconstruction = WaveformLosses(loss)
        self.discriminators = Discriminators(adversary.discriminators)

    def forward(self, wave: Tensor, step: Tensor) -> dict[str, Tensor]:
        """Return the losses by name; those of the adversary from its first step on.

        wave: [batch, 2, samples]; step: [], the optimizer steps taken before.
        """
        mean, deviation = (part.float() for part in self.vae.encode_distribution(wave))
        found = self.vae.decode(mean + deviation * torch.randn_like(mean), wave.shape[-1]).float()
        losses = {**self.reconstruction(found, wave), "kl": divergence(mean, deviation)}
        total = losses["reconstruction"] + self.loss.kl * losses["kl"]
        if int(step) >= self.adversary.start_step:
            losses |= self.contest(found, wave)
            total = total + self.adversary.adversarial * losses["adversarial"]
            total = total + self.adversary.feature_matching * losses["feature_matching"]
            total = total + losses["discriminator"]
        else:
            # Data parallelism waits for a gradient of every weight.
            total = total + 0 * torch.stack([p.sum() for p in self.discriminators.parameters()]).sum()
        return {"total": total, **losses}

    def contest(self, found: Tensor, wave: Tensor) -> dict[str, Tensor]:
        """Return "adversarial" and "feature_matching" of the autoencoder, and the "discriminator" loss.

        found: rebuilt [batch, 2, samples], whose graph only the first two reach; wave: the originals. The
        discriminators' weights get gradients from the third alone.
        """
        real = self.discriminators(wave)
        frozen = {name: weight.detach() for name, weight in self.discriminators.named_parameters()}
        judged = functional_call(self.discriminators, frozen, (found,))
        return {
            "adversarial": adversarial_loss(judged),
            "feature_matching": feature_matching_loss(real, judged),
            "discriminator": discriminator_loss(real, self.discriminators(found.detach())),
        }


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the latents from N(0, 1) in nats per frame (Kingma, 1312.6114, B).

    mean, deviation: [batch, latent_dim, frames].
    """
    nats = 0.5 * (mean.square() + deviation.square() - 1) - deviation.log()
    return nats.sum(dim=1).mean()
