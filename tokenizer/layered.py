"""The codes of AccompGen: semantic ones of the vocal, semantic and acoustic ones of the accompaniment.

The accompaniment's codes are packed into one tensor [rows, frames] at the codec's rate: first the semantic
codes, in as many rows as a frame of the codec holds of them, then the codec's codebooks. So a given start and
what is composed have one form, whatever the two rates are.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .acoustic_codec import AcousticCodec
from .common.audio import SAMPLE_RATE_HZ
from .common.errors import ConfigError
from .model import TRACKS, ReadOut
from .semantic import SemanticTokenizer
from .spectra import Chroma, LogMel, level_gain

_MEL_BANDS = 128
_READ_HOP_SAMPLES = 1920  # whole frames of mel and chroma


def semantic_rows(semantic_hz: float, codec_hz: float) -> int:
    """Return how many rows of packed codes are semantic ones."""
    return max(1, math.ceil(semantic_hz / codec_hz - 1e-6))


def pack_codes(semantic: Tensor, acoustic: Tensor, *, semantic_hz: float, codec_hz: float) -> Tensor:
    """Semantic codes [k] and a codec's [codebooks, frames] of one stretch -> [rows + codebooks, frames]."""
    rows, frames = semantic_rows(semantic_hz, codec_hz), acoustic.shape[1]
    places = torch.arange(rows * frames, dtype=torch.float64) * semantic_hz / (codec_hz * rows)
    index = (places + 1e-6).floor().long().clamp_max(len(semantic) - 1).to(semantic.device)
    return torch.cat([semantic[index].unflatten(0, (frames, rows)).T, acoustic])


def unpack_codes(packed: Tensor, *, semantic_hz: float, codec_hz: float) -> tuple[Tensor, Tensor]:
    """Undo `pack_codes`: semantic codes [k] of whole frames, and the codec's [codebooks, frames]."""
    rows, frames = semantic_rows(semantic_hz, codec_hz), packed.shape[1]
    count = int(frames * semantic_hz / codec_hz + 1e-6)
    places = torch.arange(count, dtype=torch.float64) * (codec_hz * rows) / semantic_hz
    index = (places - 1e-6).ceil().long().to(packed.device)
    return packed[:rows].T.flatten()[index], packed[rows:]


class LayeredTokenizer(nn.Module):
    """What `DuoTokenizer` is to DuoTok: waves to the codes that the language model knows, and what they say.

    `features` of codes are the codes themselves: a codec's decoder needs nothing else.
    """

    READABLE = ("accompaniment",)  # what a semantic code of a vocal sounds like, nobody can say

    def __init__(self, semantic: SemanticTokenizer, codec: AcousticCodec) -> None:
        super().__init__()
        self.semantic, self.codec = semantic, codec
        self.log_mel, self.chroma = LogMel(_MEL_BANDS), Chroma()

    @property
    def fingerprint(self) -> str:
        """Of both tokenizers."""
        return f"{self.semantic.fingerprint}-{self.codec.fingerprint}"

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second of packed codes."""
        return self.codec.frame_rate_hz

    @property
    def hop_samples(self) -> int:
        """Samples of a frame of packed codes, in whole ones."""
        return int(SAMPLE_RATE_HZ / self.codec.frame_rate_hz)

    @property
    def rates(self) -> dict[str, float]:
        """The rates that packing needs."""
        return {"semantic_hz": self.semantic.frame_rate_hz, "codec_hz": self.codec.frame_rate_hz}

    @torch.no_grad()
    def encode(self, wave: Tensor, track: str) -> Tensor:
        """wave [batch, channels, samples] at 48 kHz -> of "vocal" semantic codes [batch, frames at 50 Hz].

        Of "accompaniment" packed codes [batch, rows, frames].
        """
        if track not in TRACKS:
            raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {track!r}")
        semantic = self.semantic.encode(wave)
        if track == "vocal":
            return semantic
        pairs = zip(semantic, self.codec.encode(wave), strict=True)
        return torch.stack([pack_codes(own, codes, **self.rates) for own, codes in pairs])

    def features(self, codes: Tensor, track: str) -> Tensor:
        """Packed codes [batch, rows, frames] -> codec's codes [batch, frames, codebooks]."""
        return codes[:, semantic_rows(**self.rates) :].transpose(1, 2)

    @torch.no_grad()
    def read_out(self, codes: Tensor, track: str) -> ReadOut:
        """Return the mel and chroma of the sound that packed codes [batch, rows, frames] decode to."""
        if track not in self.READABLE:
            raise ConfigError(f"semantic codes of a {track} cannot be read; listen to its wave")
        return self.targets(self.codec.decode(self.features(codes, track).transpose(1, 2)))

    @torch.no_grad()
    def targets(self, wave: Tensor) -> ReadOut:
        """Return the true mel and chroma of wave [batch, channels, samples], at the standard level."""
        mono = wave.mean(dim=1) * level_gain(wave)
        mono = functional.pad(mono, (0, -mono.shape[-1] % _READ_HOP_SAMPLES))
        return ReadOut(mel=self.log_mel(mono), chroma=self.chroma(mono))
