"""Separation by tokens (arXiv 2604.09371): a language model writes the codes of each track of the mix.

What the codec makes of the codes, "tokens-written", is a sound of its own: mono, with phases of its own, so
that it does not sum to the mix. "tokens" takes from it how much of each frequency belongs to whom, at each
time, and gives out that share of the mix itself.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from duotok.lm.separator.model import TokenSeparator
from duotok.lm.separator.writing import plan_windows, write_song
from duotok.recipes.separation.stems import complete_stems, separate_in_pieces
from duotok.renderer.latent_codec import open_codec
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import CheckpointError, ConfigError
from duotok.tokenizer.common.hub import local_folder
from duotok.tokenizer.spectra import level_gain

FFT_SIZE, HOP_SAMPLES = 4096, 960
_PIECE_SECONDS, _OVERLAP_SECONDS = 60, 1  # of what is masked at a time
_FLOOR = 1e-8  # of the power of every track, so that all have equal shares of silence


class TokensSeparator:
    """A trained token separator and its codec."""

    def __init__(self, checkpoint: str | None, device: str = "cpu", *, name: str = "tokens") -> None:
        self.name = name
        if checkpoint is None:
            raise ConfigError(
                f"the separator {name} needs a folder of recipes/lm/separator by --checkpoint (of generate: "
                "--separator-checkpoint)"
            )
        folder = local_folder(checkpoint)
        self.model = TokenSeparator.from_pretrained(folder)
        if not (folder / "codec").is_dir():
            raise CheckpointError(f"{folder} has no codec; put the one that it was trained on into it")
        self.codec = open_codec(folder / "codec")
        self.model.require_codec(self.codec)
        self.model.to(device)
        self.codec.to(device)
        self.window = torch.hann_window(FFT_SIZE)

    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [2, samples] at 48 kHz -> four stems of the same shape that sum to it.

        Raises AudioError for a mix shorter than a window of the model.
        """
        written = self.write(wave)
        if self.name != "tokens":
            return complete_stems(wave, {name: each.expand(2, -1) for name, each in written.items()})
        return self.share(wave, written)

    def joints(self, samples: int) -> list[int]:
        """Where one window gives way to the next in a mix of so many samples."""
        codec = self.model.config.codec
        plan = plan_windows(self.model.config, codec.frames(samples / SAMPLE_RATE_HZ))
        return [round(window.given * SAMPLE_RATE_HZ / codec.rate_hz) for window in plan[1:]]

    def share(self, wave: Tensor, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Four stems [2, samples] that sum to the wave, by what was written of each track [1, samples]."""
        tracks = torch.cat([wave, *written.values()])
        stems = separate_in_pieces(
            tracks,
            self._mask,
            piece=_PIECE_SECONDS * SAMPLE_RATE_HZ,
            overlap=_OVERLAP_SECONDS * SAMPLE_RATE_HZ,
        )
        return complete_stems(wave, dict(zip(written, stems, strict=True)))

    @torch.no_grad()
    def write(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [2, samples] -> what the codec makes of each track's codes, [1, samples]."""
        mono = wave.mean(dim=0)
        gain = float(level_gain(mono[None]))
        levels = self.model.config.codec.levels
        try:
            codes = write_song(self.model, gain * mono)[:, :levels]
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "the device has too little memory for this separator; use --device cpu"
            ) from error
        sounds = {}
        for track, own in zip(self.model.config.tracks, codes, strict=True):
            sound = self.codec.decode(own[None], wave.shape[-1])[0].cpu()
            sounds[track] = sound.mean(dim=0, keepdim=True) / gain
        return sounds

    def _mask(self, tracks: Tensor) -> Tensor:
        """The mix, 2 channels, and what was written of each track [2 + tracks, n] -> stems [tracks, 2, n]."""
        shape: Any = {"n_fft": FFT_SIZE, "hop_length": HOP_SAMPLES, "window": self.window}
        spectra = torch.stft(tracks, **shape, pad_mode="constant", return_complex=True)  # [.., bins, frames]
        powers = spectra[2:].abs().square() + _FLOOR
        masked = (powers / powers.sum(dim=0))[:, None] * spectra[:2]  # [tracks, 2, bins, frames]
        stems = torch.istft(masked.flatten(0, 1), **shape, length=tracks.shape[-1])
        return stems.unflatten(0, (-1, 2))
