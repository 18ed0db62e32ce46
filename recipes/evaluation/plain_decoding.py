"""The language model sampled without any of this project's decoding: what that is measured against.

`transformers` as it comes: a cache that grows by concatenation, one pass per guidance branch, one window.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.layout import Layout
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.sampling import draw_uniform, pick_codes
from duotok.lm.sheet.columns import commit
from duotok.tokenizer.common.errors import ConfigError


@torch.no_grad()
def generate_plainly(lm: DualTrackLM, vocal_codes: Tensor, seed: int, config: SamplingConfig) -> Tensor:
    """Return accompaniment codes [frames] for vocal codes [frames]: those of `compose`, only later."""
    frames = len(vocal_codes)
    if frames > config.window_frames:
        raise ConfigError(f"one window has {config.window_frames} frames, got {frames}")
    pad = lm.pads["accompaniment"]
    uniform = draw_uniform(seed, frames)
    drops = (False, True) if config.guidance != 1.0 else (False,)
    caches = [DynamicCache() for _ in drops]
    chosen = torch.full((frames,), pad)
    sheet = lm.read_sheet(vocal_codes[None])
    if sheet is not None:
        sheet = commit(sheet)
    for frame in range(frames):
        branches = []
        for drop, cache in zip(drops, caches, strict=True):
            layout = lm.lay_out(
                {"vocal": vocal_codes[None], "accompaniment": chosen[None]},
                "vocal_to_accompaniment",
                drop_source=torch.tensor([drop]),
                sheet=sheet,
            )
            # The prompt in one pass, then one step per frame; each at its own positions.
            if frame == 0:
                _advance(lm, layout, slice(0, frames), cache)
            hidden = _advance(lm, layout, slice(frames + frame, frames + frame + 1), cache)
            branches.append(lm.codes_of("accompaniment").logits(hidden[:, -1]))
        given, absent = branches[0], branches[-1]
        logits = absent + config.guidance * (given - absent) if len(branches) > 1 else given
        chosen[frame] = pick_codes(logits, uniform[frame : frame + 1], config)[0]
    return chosen


def _advance(lm: DualTrackLM, layout: Layout, steps: slice, cache: DynamicCache) -> Tensor:
    """States [1, steps, hidden_dim] of some steps of a layout, remembered in the cache."""
    parts = (layout.vocal, layout.accompaniment, layout.segment, layout.sheet)
    inputs = lm.embed(*(part[:, steps] for part in parts))
    output = lm.backbone(
        inputs_embeds=inputs, position_ids=layout.position[:, steps], past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state
