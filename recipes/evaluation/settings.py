"""What one run of the evaluation measures."""

from dataclasses import dataclass
from pathlib import Path

from duotok.tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, on what."""

    corpus: Path  # folder with test.jsonl
    bundle: Path
    items: int | None = None  # test items that are measured; None = each part's own default
    seconds: float | None = None  # length of each excerpt; None = each part's own default
    seed: int = 0
    real_stems: Path | None = None  # folder with the four stems of a real song, for the separator
    recordings: Path | None = None  # folder of real recordings, for the VAE
    vae: Path | None = None  # folder of a VAE to measure alone, in place of the bundle's renderer
    speed: bool = True  # whether `generate` (on 30 s and 180 s), encoding and decoding are also timed
    sound: bool = True  # whether `decoding` and `long` also render what they compose, and listen to it
    plots: Path | None = None  # folder for the pictures of the parts that draw some
    folder: Path | None = None  # of quality's table, picture and kept measures; None = only its figures

    def __post_init__(self) -> None:
        if self.items is not None and self.items < 2:
            raise ConfigError(f"--items must be at least 2, for mismatched pairs, got {self.items}")
        if self.seconds is not None and self.seconds < 4:
            raise ConfigError(f"--seconds must be at least 4, got {self.seconds:g}")
