"""Where products of bfloat16 numbers are faster than those of float32."""

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware of a CPU or CUDA device multiplies bfloat16 natively; of other devices False."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Intel and AMD; torch offers no such question about other processors.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in questions)


def native_autocast(device: torch.device) -> torch.autocast:
    """Cast the large products to bfloat16 where `multiplies_bf16`; elsewhere a context that does nothing."""
    enabled = multiplies_bf16(device)
    return torch.autocast(device.type if enabled else "cpu", torch.bfloat16, enabled=enabled)
