"""Which attention kernel the backbone uses."""

from typing import NamedTuple

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

AMPERE = (8, 0)  # lowest compute capability of flash-attention 2
WIDEST_FLASH_HEAD = 256


class AttentionChoice(NamedTuple):
    """A kernel by transformers' name, and why this one."""

    name: str
    reason: str


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    """Choose flash-attention 2 where it is installed and can run, SDPA otherwise.

    It runs on CUDA devices from Ampere on, in float16 and bfloat16, with heads of up to 256 numbers. dtype:
    what the kernel is given, under autocast the type cast to.
    """
    missing = None
    if device.type != "cuda":
        missing = f"flash-attention 2 needs CUDA, this is {device.type}"
    elif not is_flash_attn_2_available():
        missing = "flash-attn is not installed"
    elif torch.cuda.get_device_capability(device) < AMPERE:
        missing = f"flash-attention 2 needs Ampere or newer, this is {torch.cuda.get_device_name(device)}"
    elif dtype not in (torch.float16, torch.bfloat16):
        missing = f"flash-attention 2 needs half precision, this is {str(dtype).removeprefix('torch.')}"
    elif head_dim > WIDEST_FLASH_HEAD:
        missing = f"flash-attention 2 takes heads of up to {WIDEST_FLASH_HEAD} numbers, these have {head_dim}"
    if missing is not None:
        return AttentionChoice("sdpa", missing)
    return AttentionChoice("flash_attention_2", f"flash-attn is installed, inputs are {dtype} on {device}")
