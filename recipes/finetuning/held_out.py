"""Which songs are held out, and how well a model predicts the band of fixed windows of songs."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import score_batch
from duotok.recipes.finetuning.settings import FEWEST_TO_HOLD_OUT
from duotok.recipes.lm.tokens import TokenShards, TokenSong

WINDOW_SECONDS = 30.0  # of shorter songs the whole
MOST_WINDOWS = 16


def choose_held_out(names: Sequence[str], share: float) -> set[str]:
    """Return the songs not to learn from: a share of them, at least one of four or more, chosen by name.

    The choice goes by a hash of the name, so that adding a song seldom moves another one.
    """
    distinct = sorted(set(names), key=lambda name: sha256(f"held out:{name}".encode()).hexdigest())
    if share == 0 or len(distinct) < FEWEST_TO_HOLD_OUT:
        return set()
    return set(distinct[: max(1, round(share * len(distinct)))])


class LossMeter:
    """Measures the teacher-forced loss of the accompaniment given the vocal, without a prefix."""

    def __init__(
        self, shards: TokenShards, songs: Sequence[TokenSong], *, most_windows: int = MOST_WINDOWS
    ) -> None:
        """At most so many windows are chosen, spread evenly over the songs."""
        longest = round(WINDOW_SECONDS * shards.index.frame_rate_hz)
        windows = []
        for song in songs:
            frames = min(longest, song.frames)
            windows += [(song, start, frames) for start in range(0, song.frames - frames + 1, frames)]
        picked = np.linspace(0, len(windows) - 1, min(len(windows), most_windows)).round().astype(int)
        self._shards = shards
        self._windows = [windows[number] for number in picked]

    @torch.no_grad()
    def measure(self, lm: DualTrackLM) -> float:
        """Return the mean loss in nats per accompaniment token."""
        was_training = lm.training
        lm.eval()
        total, count = 0.0, 0
        for song, start, frames in self._windows:
            codes = self._shards.codes(song, start, frames)
            scores = score_batch(
                lm, codes["vocal"][None], codes["accompaniment"][None], "vocal_to_accompaniment"
            )
            total += float(scores.loss_nats["accompaniment"].double().sum())
            count += frames
        lm.train(was_training)
        return total / count
