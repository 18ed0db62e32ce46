"""Low-rank adapters on the language model's backbone (LoRA, Hu et al. 2021), by the package peft."""

import torch
from torch import nn

from duotok.lm.dual_track.model import DualTrackLM
from duotok.tokenizer.common.errors import ConfigError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA_PER_RANK = 2  # the adapters' update is scaled by alpha / rank, so that the rank leaves its size alone


def require_peft() -> None:
    """Raise ConfigError when peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--lora needs the package peft: pip install peft, or leave --lora out to train all weights"
        ) from error


def add_adapters(lm: DualTrackLM, rank: int, seed: int = 0) -> None:
    """Put an adapter on every linear layer of the backbone and freeze all other weights.

    The adapters start as no change at all. Raises ConfigError when peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=list(TARGETS))
    lm.requires_grad_(False)
    inject_adapter_in_model(config, lm.backbone)


@torch.no_grad()
def merge_adapters(lm: DualTrackLM) -> None:
    """Add the adapters into the weights and take them out: an ordinary model with the same logits."""
    from peft.tuners.lora import LoraLayer

    adapted = [(name, layer) for name, layer in lm.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        setattr(lm.get_submodule(parent), attribute, base)
    lm.requires_grad_(True)
    if lm.sheet_reader is not None:
        lm.sheet_reader.requires_grad_(False)
