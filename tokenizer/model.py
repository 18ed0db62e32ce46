"""DuoTok: a wave becomes one code per 40 ms and track; codes become features, mel and chroma (P 3)."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .blocks import Encoder, LocalTransformer, NoisyBottleneck, UpsamplingHead
from .common.audio import SAMPLE_RATE_HZ
from .common.checkpoint import Component
from .common.chunks import chunk_size, join_chunks
from .common.errors import AudioError, CheckpointError, ConfigError
from .common.long_waves import let_go
from .heads import HeadOutputs, MaskHead, TextHead, ideal_ratio_masks
from .quantizers import PlainVQ, SimVQ, VectorQuantizer
from .spectra import Chroma, LogMel, level_gain
from .text import TextVocabulary, collapse_alignment, open_vocabulary

TRACKS = ("vocal", "accompaniment")
HOP_SAMPLES = 1920
MEL_PER_FRAME = 4
CHROMA_PER_FRAME = 2
QUANTIZERS: dict[str, type[VectorQuantizer]] = {"simvq": SimVQ, "plain_vq": PlainVQ}


@dataclass(frozen=True, kw_only=True)
class DuoTokenizerConfig:
    """Settings of the tokenizer; the defaults are the paper's size (P 3, C.5)."""

    mel_bands: int = 128
    dim: int = 1024  # width of the Transformer and of the features
    heads: int = 16
    feed_forward_dim: int = 2816
    blocks: int = 12  # in each half
    attention_window: int = 128  # frames seen to each side
    code_dim: int = 64
    vocal_codes: int = 32_768
    accompaniment_codes: int = 32_768
    head_dim: int = 512  # width inside the read-out heads
    text_tokens: int = 0  # of the lyric head, its blank included; 0 = no such head
    mask_head: bool = False  # soft masks of four stems, as stage 2 needs (P eq. 3)
    quantizer: str = "simvq"  # or plain_vq
    shared_codebook: bool = False  # one way through the bottleneck for both tracks, instead of routing

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ConfigError(f"dim {self.dim} must divide into {self.heads} heads of even width")
        for name, low, high in (
            ("mel_bands", 1, 4096),
            ("vocal_codes", 2, 2**20),
            ("accompaniment_codes", 2, 2**20),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, got {value}")
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if self.shared_codebook and self.vocal_codes != self.accompaniment_codes:
            raise ConfigError(
                f"a shared codebook needs equal numbers of codes, got {self.vocal_codes} and "
                f"{self.accompaniment_codes}"
            )


class ReadOut(NamedTuple):
    """What codes say about the sound, at the standard level."""

    mel: Tensor  # [batch, 4 * frames, mel_bands] log10-mel magnitudes
    chroma: Tensor  # [batch, 2 * frames, 12] in 0..1, bin 0 = C


class TrackQuantizer(nn.Module):
    """One track's way through the bottleneck: project in, quantize, project out (P 3.3)."""

    def __init__(self, dim: int, code_dim: int, codebook_size: int, quantizer: str) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim, code_dim)
        self.quantizer = QUANTIZERS[quantizer](codebook_size, code_dim)
        self.project_out = nn.Linear(code_dim, dim)


class DuoTokenizer(Component[DuoTokenizerConfig]):
    """Dual-track tokenizer: hard routing of each track to its own codebook (P 3.3)."""

    KIND = "tokenizer"
    CONFIG = DuoTokenizerConfig

    frame_rate_hz = SAMPLE_RATE_HZ / HOP_SAMPLES
    hop_samples = HOP_SAMPLES
    READABLE = TRACKS  # whose codes say by themselves how they sound
    CHUNK_FRAMES = 750  # at least

    mel_mean: Tensor
    mel_deviation: Tensor

    def __init__(self, config: DuoTokenizerConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.log_mel = LogMel(config.mel_bands)
        self.chroma = Chroma()
        self.register_buffer("mel_mean", torch.zeros(config.mel_bands))
        self.register_buffer("mel_deviation", torch.ones(config.mel_bands))
        self.encoder = Encoder(config.mel_bands, self._transformer(), dim)
        self.bottleneck = NoisyBottleneck(dim, config.code_dim)
        sizes = {"vocal": config.vocal_codes, "accompaniment": config.accompaniment_codes}
        # A shared codebook is the first track's; the other has no weights of its own.
        owners = TRACKS[:1] if config.shared_codebook else TRACKS
        self.tracks = nn.ModuleDict(
            {t: TrackQuantizer(dim, config.code_dim, sizes[t], config.quantizer) for t in owners}
        )
        self.upper = self._transformer()
        self.mel_head = UpsamplingHead(dim, config.head_dim, config.mel_bands, doublings=2)
        self.chroma_head = UpsamplingHead(dim, config.head_dim, 12, doublings=1)
        self.text_head = TextHead(dim, config.text_tokens) if config.text_tokens else None
        self.mask_head = MaskHead(dim, config.head_dim, config.mel_bands) if config.mask_head else None
        self.text: TextVocabulary | None = None

    def _transformer(self) -> LocalTransformer:
        c = self.config
        return LocalTransformer(
            dim=c.dim, heads=c.heads, hidden=c.feed_forward_dim, blocks=c.blocks, window=c.attention_window
        )

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.config.dim

    def route(self, track: str) -> TrackQuantizer:
        """Return a track's own way through the bottleneck; ConfigError for an unknown track."""
        if track not in TRACKS:
            raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {track!r}")
        route = self.tracks[TRACKS[0] if self.config.shared_codebook else track]
        assert isinstance(route, TrackQuantizer)
        return route

    def codebook_size(self, track: str) -> int:
        """Return the number of codes of a track."""
        return len(self.route(track).quantizer.basis)

    def code_vectors(self, track: str) -> Tensor:
        """Return the code vectors [codebook_size, code_dim] of a track."""
        return self.route(track).quantizer.entries().detach()

    @torch.no_grad()
    def encode(self, wave: Tensor, track: str) -> Tensor:
        """Turn wave [batch, channels, samples] at 48 kHz into codes [batch, ceil(samples / 1920)].

        Any length; memory is bounded because the encoder's reach is finite, so that overlapping chunks give
        the codes of one pass.
        """
        gain = level_gain(_check_wave(wave))
        route = self.route(track)
        halo = self.encoder.transformer.reach_frames + 4  # 4: downsampling and the spectrogram's window

        def encode_chunk(low: int, high: int) -> Tensor:
            mono = _to_mono(wave[..., low * HOP_SAMPLES : high * HOP_SAMPLES]) * gain
            let_go(wave)
            features = self.encoder(self.normalize(self.log_mel(mono)))
            return route.quantizer.encode(route.project_in(features))

        frames = -(-wave.shape[-1] // HOP_SAMPLES)
        return join_chunks(frames, encode_chunk, size=chunk_size(self.CHUNK_FRAMES, halo), halo=halo)

    @torch.no_grad()
    def features(self, codes: Tensor, track: str) -> Tensor:
        """Return contextual features [batch, frames, dim] of codes [batch, frames] of any length."""
        route = self.route(track)

        def compute(low: int, high: int) -> Tensor:
            vectors = nn.functional.embedding(codes[:, low:high], route.quantizer.entries())
            return self.upper(route.project_out(vectors))

        halo = self.upper.reach_frames
        return join_chunks(codes.shape[1], compute, size=chunk_size(self.CHUNK_FRAMES, halo), halo=halo)

    @torch.no_grad()
    def read_out(self, codes: Tensor, track: str) -> ReadOut:
        """Return the mel and chroma that codes [batch, frames] stand for, without any audio."""
        features = self.features(codes, track)
        halo = 4  # reach of the heads' convolutions, in frames

        def read(head: nn.Module, rate: int) -> Tensor:
            def compute(low: int, high: int) -> Tensor:
                return head(features[:, low:high])

            return join_chunks(codes.shape[1], compute, size=self.CHUNK_FRAMES, halo=halo, rate=rate)

        mel, chroma = read(self.mel_head, MEL_PER_FRAME), read(self.chroma_head, CHROMA_PER_FRAME)
        return ReadOut(mel=self.denormalize(mel), chroma=chroma.sigmoid())

    @torch.no_grad()
    def targets(self, wave: Tensor) -> ReadOut:
        """Return the true mel and chroma of wave [batch, channels, samples] in the form of `read_out`."""
        mono = _to_mono(_check_wave(wave)) * level_gain(wave)
        return ReadOut(mel=self.log_mel(mono), chroma=self.chroma(mono))

    @torch.no_grad()
    def read_text(self, codes: Tensor, track: str) -> list[str]:
        """Return the lyrics that codes [batch, frames] stand for, by the best path of the lyric head."""
        if self.text_head is None or self.text is None:
            raise ConfigError("this tokenizer has no lyric head; train it with a text model")
        best = self.text_head(self.features(codes, track)).argmax(dim=-1).tolist()
        return [self.text.decode(collapse_alignment(row, self.text.size)) for row in best]

    def read_heads(self, features: Tensor) -> HeadOutputs:
        """Return what the heads say of features after the bottleneck [batch, frames, dim]."""
        hidden = self.upper(features)
        return HeadOutputs(
            mel=self.mel_head(hidden),
            chroma_logits=self.chroma_head(hidden),
            text_logits=None if self.text_head is None else self.text_head(hidden),
            mask_logits=None if self.mask_head is None else self.mask_head(hidden),
        )

    @torch.no_grad()
    def mask_targets(self, stems: Tensor) -> Tensor:
        """Return ideal ratio masks [batch, frames, 4, mel_bands] at 50 Hz of stems [batch, 4, samples]."""
        power = self.log_mel.power(stems.flatten(0, 1), 2 * self.log_mel.hop_samples)
        return ideal_ratio_masks(
            rearrange(power, "(batch stems) frames bands -> batch frames stems bands", stems=stems.shape[1])
        )

    def with_heads(self, *, text: TextVocabulary | None, masks: bool) -> "DuoTokenizer":
        """Return a tokenizer with these heads and the weights of this one; heads it had not are new."""
        tokens = 0 if text is None else text.size + 1
        model = DuoTokenizer(replace(self.config, text_tokens=tokens, mask_head=masks))
        wanted, mine = model.state_dict(), self.state_dict()
        kept = {n: t for n, t in mine.items() if n in wanted and t.shape == wanted[n].shape}
        model.load_state_dict(wanted | kept)
        model.text = text
        return model.train(self.training)

    def normalize(self, mel: Tensor) -> Tensor:
        """Bring log-mel to zero mean and unit deviation per band of the training corpus."""
        return (mel - self.mel_mean) / self.mel_deviation

    def denormalize(self, mel: Tensor) -> Tensor:
        """Undo `normalize`."""
        return mel * self.mel_deviation + self.mel_mean

    def _describe_extra(self) -> dict[str, Any]:
        return {} if self.text is None else {"text": self.text.describe()}

    def _take_extra(self, extra: dict[str, Any]) -> None:
        if "text" in extra:
            self.text = open_vocabulary(extra["text"])
            if self.text.size + 1 != (tokens := self.config.text_tokens):
                raise CheckpointError(
                    f"the text model has {self.text.size} tokens but the lyric head {tokens - 1}"
                )


def _check_wave(wave: Tensor) -> Tensor:
    if wave.ndim != 3 or wave.shape[-1] == 0:
        raise AudioError(f"a wave must be [batch, channels, samples], got shape {tuple(wave.shape)}")
    return wave


def _to_mono(wave: Tensor) -> Tensor:
    """The middle [batch, samples] of wave [batch, channels, samples], to whole frames."""
    return nn.functional.pad(wave.mean(dim=1), (0, -wave.shape[-1] % HOP_SAMPLES))
