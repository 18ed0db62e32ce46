"""The sounds whose quality is measured: what the model makes of test songs, and references for the scale."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.excerpts import Excerpt
from duotok.recipes.evaluation.rebuilding import rebuild_by_vae, rebuild_from_codes

# Sound -> what it is. The last four are references.
SOUNDS = {
    "vae": "VAE alone",
    "round_trip": "tokens, round trip",
    "generated": "generated for the vocal",
    "original": "the original itself",
    "shuffled": "another song's original",
    "random": "white noise",
    "silent": "silence",
}
# Made at the level of the recording; codes do not know it, and another song has another one.
_KEEPS_LEVEL = ("vae", "original")


class SoundMaker:
    """Makes all sounds of an excerpt with one loaded bundle."""

    def __init__(self, bundle: Path, seed: int) -> None:
        self._accompanist = Accompanist.from_pretrained(bundle)
        self._seed = seed

    @property
    def rendered_tracks(self) -> tuple[str, ...]:
        """The tracks this bundle has decoders of; of others only the VAE alone can be heard."""
        return tuple(self._accompanist.bundle.renderer.decoders)

    def make(self, excerpt: Excerpt, other: Excerpt, track: str) -> dict[str, Tensor]:
        """The sounds of a track of an excerpt, as they come out: {sound: [2, samples]} at 48 kHz.

        other: an excerpt of another song, as long as this one.
        """
        wave = excerpt.read(track)
        parts = self._accompanist.bundle
        noise = np.random.default_rng((self._seed, 0)).standard_normal(tuple(wave.shape), dtype=np.float32)
        sounds = {
            "vae": rebuild_by_vae(parts.renderer.vae, wave),
            "original": wave,
            "shuffled": other.read(track),
            "random": match_level(torch.from_numpy(noise), wave),
            "silent": torch.zeros_like(wave),
        }
        if track in self.rendered_tracks:
            sounds["round_trip"] = rebuild_from_codes(
                parts.tokenizer, parts.renderer, wave, track, self._accompanist.defaults, self._seed
            )
        if track == "accompaniment":
            made = self._accompanist.accompany(excerpt.read("vocal"), seed=self._seed)
            sounds["generated"] = made.accompaniment
        return {sound: sounds[sound] for sound in SOUNDS if sound in sounds}


def level_sounds(sounds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sounds at the level of the original where they cannot know it (P B.3: loudness normalization)."""
    original = sounds["original"]
    return {
        sound: wave if sound in _KEEPS_LEVEL else match_level(wave, original)
        for sound, wave in sounds.items()
    }
