"""What every model that composes offers, whatever is inside: all that pipeline and bundle know of one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..tokenizer.common.checkpoint import Component, ConfigT
from ..tokenizer.common.errors import ConfigError
from .sheet.playing import BandConfig


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of sampling and window stitching."""

    guidance: float = 1.5  # logits = without + guidance * (with - without); 1 turns guidance off
    # The same of style and levels: logits = untold + playing_guidance * (told - untold)
    playing_guidance: float = 1.0
    temperature: float = 0.95  # 0 takes the most likely code
    top_k: int = 100  # most likely codes kept; 0 keeps all
    top_p: float = 0.95  # smallest set of codes with this probability is kept; 1 keeps all
    window_frames: int = 750
    overlap_frames: int = 50  # codes of the last window that the next one continues

    def __post_init__(self) -> None:
        for name in ("guidance", "playing_guidance", "temperature", "top_k"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.overlap_frames < self.window_frames:
            raise ConfigError(
                f"overlap_frames must be in 0..window_frames - 1, "
                f"got {self.overlap_frames} of {self.window_frames}"
            )


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Sampled codes and how likely the model found them, a by-product of sampling.

    Log-probabilities are means over the sampled codes (given ones do not count), in nats per code, before
    temperature, top-k and top-p; None where nothing was sampled or, without guidance, not computed.
    """

    codes: Tensor  # [candidates, frames] int64, with several codebooks [candidates, codebooks, frames]
    likelihood_nats: Tensor | None  # [candidates] with the source
    likelihood_alone_nats: Tensor | None  # [candidates] without it, needs guidance other than 1

    @property
    def information_nats(self) -> Tensor | None:
        """Pointwise mutual information with the source [candidates], in nats per code."""
        if self.likelihood_nats is None or self.likelihood_alone_nats is None:
            return None
        return self.likelihood_nats - self.likelihood_alone_nats


class LanguageModel(Component[ConfigT], ABC):
    """Composes accompaniment codes for the codes of a vocal."""

    tokenizer_fingerprint: str | None  # of the tokenizer whose codes it learned

    @property
    @abstractmethod
    def band(self) -> BandConfig | None:
        """The styles that it can be asked for; None of a model that is not told how to play."""

    @abstractmethod
    def compose(
        self,
        source_codes: Tensor,
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        prefix: Tensor | None = None,
        sheet: Tensor | None = None,
        again: Tensor | None = None,
        stop: int | None = None,
        progress: Callable[[int], None] | None = None,
        follow: Callable[[Tensor], None] | None = None,
    ) -> Candidates:
        """Return one candidate per seed, as long as the source; what a seed gives depends on no other seed.

        source_codes: [frames] or [codebooks, frames], one frame or more. prefix: given codes that every
        candidate begins with, in the same form. sheet [frames, COLUMNS]: the lead sheet, or one for each seed
        [seeds, frames, COLUMNS], which differ in how the band plays; None: as the model reads it, if it can.
        again [frames] int64: the earlier frame whose codes a frame takes, -1 where the model composes: what
        is sung again is played again. stop: the frame before which the candidates end, of a source that is
        heard further. progress is called with the number of frames done; follow with the codes so far, in the
        form of the result, as they grow (by a second or so, if the model composes along time) and when whole.
        Raises DataError for codes that are not this model's.
        """

    @abstractmethod
    def judge(
        self, source_codes: Tensor, codes: Tensor, *, first: int, sheet: Tensor | None = None
    ) -> Tensor:
        """Return how likely the codes from frame `first` on are, after those before: nats per code [rows].

        source_codes: [frames] or [codebooks, frames], one window of them; codes: rows of the same form;
        sheet: [frames, COLUMNS], for all rows.
        """

    @abstractmethod
    def read_sheet(self, codes: Tensor) -> Tensor | None:
        """Return the lead sheet [batch, frames, COLUMNS] of vocal codes [batch, frames].

        None of a model that plays from no sheet.
        """

    @abstractmethod
    def hear_sheet(self, codes: Tensor) -> dict[str, Tensor] | None:
        """Return what each frame of vocal codes [batch, frames] says by itself, for a plan of the whole song.

        "place" [batch, frames, METERS, PLACES] of meter and place in the bar, -inf of meters it cannot
        hear, and "chord" [batch, frames, CHORDS]: log-probabilities on the CPU.
        None of a model that plays from no sheet.
        """
