"""Stage 3: two SimVQ codebooks on the frozen encoder, stems routed by track (P 3.3).

Run: python -m duotok.recipes.tokenizer.stage3 recipes/tokenizer/stage3/small.yaml --out runs/small/stage3
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler, collate_cuts
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import TRACKS, DuoTokenizer
from duotok.tokenizer.objectives import DualCodebookObjective, LossWeights


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of stage 3."""

    start_from: str  # tokenizer folder of stage 2
    data: CutConfig
    mixture: dict[str, float] = field(
        default_factory=lambda: {"vocal": 5, "accompaniment": 4, "instrumental": 1}
    )
    freeze_encoder: bool = True  # of the lower half; the paper's ablation unfreezes it (P D)
    start_cuts: int = 192  # of each track, whose features its codebook starts from
    text_run_seconds: float = 2.0  # as in stage 2
    weights: LossWeights = field(default_factory=LossWeights)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.train.batch_size < 2:
            raise ConfigError("train.batch_size must be at least 2, one cut of each track")
        if self.start_cuts < 1:
            raise ConfigError(f"start_cuts must be at least 1, got {self.start_cuts}")


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    sampler = CutSampler(config.data)
    tokenizer = DuoTokenizer.from_pretrained(config.start_from)
    # The inputs are stems now: there is nothing for the mask head to tell apart (P 3.3).
    tokenizer = tokenizer.with_heads(text=tokenizer.text, masks=False)
    start_codebooks(tokenizer, sampler, config.start_cuts)
    objective = DualCodebookObjective(tokenizer, config.weights, config.freeze_encoder)
    total = sum(config.mixture.values())
    vocals = round(config.train.batch_size * config.mixture.get("vocal", 0) / total)
    vocals = min(max(vocals, 1), config.train.batch_size - 1)
    others = {kind: share for kind, share in config.mixture.items() if kind != "vocal"}

    def make_batch(rng):
        kinds = ["vocal"] * vocals + sampler.draw_kinds(rng, config.train.batch_size - vocals, others)
        cuts = [sampler.cut(rng, kind) for kind in kinds]
        labels = collate_cuts(cuts, tokenizer.text, config.text_run_seconds, rng)
        waves = torch.stack([cut.wave for cut in cuts])
        return {"vocal": waves[:vocals], "accompaniment": waves[vocals:], **labels}

    return Task(objective, make_batch, tokenizer.save_pretrained, seek=sampler.seek)


@torch.no_grad()
def start_codebooks(tokenizer: DuoTokenizer, sampler: CutSampler, cuts: int) -> None:
    """Start the tracks' projections from stage 2's bottleneck, each codebook from k-means of features."""
    routes = [tokenizer.route(track) for track in TRACKS]
    for route in {id(each): each for each in routes}.values():
        tracks = [track for track, each in zip(TRACKS, routes, strict=True) if each is route]
        route.project_in.load_state_dict(tokenizer.bottleneck.project_in.state_dict())
        route.project_out.load_state_dict(tokenizer.bottleneck.project_out.state_dict())
        rng = np.random.default_rng(1)
        features = []
        for number in range(cuts):
            wave = sampler.draw(rng, [tracks[number % len(tracks)]])
            mel = tokenizer.normalize(tokenizer.log_mel(wave))
            features.append(route.project_in(tokenizer.encoder(mel)[0]))
        route.quantizer.fit_to(torch.cat(features))


main = recipe_main("Stage 3: dual codebooks", Config, build)

if __name__ == "__main__":
    sys.exit(main())
