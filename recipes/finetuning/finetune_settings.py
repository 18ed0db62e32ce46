"""Settings of one fine-tuning; kept apart from torch so that a command line can show them at once."""

from dataclasses import asdict, dataclass
from typing import Any

from duotok.tokenizer.common.errors import ConfigError

SHORTEST_SECONDS = 5.0  # of a song: the shortest training window
FEWEST_TO_HOLD_OUT = 4  # with fewer songs all are learned and nothing stops early


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How a person's songs are learned."""

    lora_rank: int | None = None  # None: all weights are trained, not low-rank adapters
    learning_rate: float | None = None  # peak; None: full_learning_rate or lora_learning_rate
    steps: int = 300  # most; without `minutes`
    minutes: float | None = None  # of training, instead of steps
    batch_size: int = 8  # windows of 5 s per step, or as much sound in longer ones
    held_out_share: float = 0.15  # of the songs
    measure_every: int = 25  # steps between two measurements of the held-out loss
    patience: int = 4  # measurements without a new best after which the training stops
    seed: int = 0

    # Chosen by 45 steps from the small model on four songs, played 3 % slower and lower than any it knew (two
    # more held out: 2.215 nats before). All weights: 1e-4 gave 2.174 and raised the loss of other songs by
    # 0.025, 3e-4 gave 2.171 and raised it by 0.11. Rank 8: 1e-3 gave 2.199 and 0.035, 3e-3 2.192 and 0.12.
    full_learning_rate = 1e-4
    lora_learning_rate = 1e-3

    def __post_init__(self) -> None:
        if self.lora_rank is not None and not 1 <= self.lora_rank <= 1024:
            raise ConfigError(f"--lora must be from 1 to 1024, got {self.lora_rank}")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ConfigError(f"--learning-rate must be above 0 and at most 1, got {self.learning_rate}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"--minutes must be above 0, got {self.minutes}")
        if not 0 <= self.held_out_share <= 0.5:
            raise ConfigError(f"--held-out must be from 0 to 0.5, got {self.held_out_share}")
        for option, value in (("--steps", self.steps), ("--batch", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{option} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that is used."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.full_learning_rate if self.lora_rank is None else self.lora_learning_rate

    def described(self) -> dict[str, Any]:
        """What a report and a run folder say about the method."""
        return {
            "method": "all weights" if self.lora_rank is None else "LoRA",
            **asdict(self),
            "learning_rate": self.peak_learning_rate,
            "steps": self.steps if self.minutes is None else None,
        }
