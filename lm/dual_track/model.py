"""The dual-track language model: a Qwen2 backbone over frames of two codes (P 5.2, B.1)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tokenizer.common.errors import ConfigError, DataError
from ...tokenizer.model import DuoTokenizer
from ..contract import Candidates, LanguageModel, SamplingConfig
from ..sheet.columns import PLAYING, UNKNOWN, LeadSheetEmbedding, check_sheet, commit
from ..sheet.playing import BandConfig
from ..sheet.reader import SheetReader, SheetReaderConfig
from .backbone import AttentionChoice, Qwen2Backbone, choose_attention
from .layout import MODES, PROMPT, SEGMENTS, TARGET_SEGMENT, TRACKS, Layout, lay_out, mode_into
from .sampling import StepParts, draw_uniform, sample_song


class TrackCodes(nn.Module):
    """Embedding table and prediction head of one track.

    Both start from the tokenizer's code vectors, so that codes that sound alike begin alike: embedding =
    linear(vector) + residual, logits = linear(hidden) . vector + residual, the residuals starting at zero.
    The code after the last one is PAD: "nothing here", learned, never predicted.
    """

    vectors: Tensor

    def __init__(self, codes: int, code_dim: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.codes = codes
        self.register_buffer("vectors", torch.zeros(codes, code_dim))
        self.anchor_in = nn.Linear(code_dim, embedding_dim, bias=False)
        self.residual_in = nn.Embedding(codes + 1, embedding_dim)
        self.anchor_out = nn.Linear(hidden_dim, code_dim, bias=False)
        self.residual_out = nn.Linear(hidden_dim, codes)
        nn.init.normal_(self.anchor_in.weight, std=code_dim**-0.5)
        nn.init.zeros_(self.residual_in.weight)
        nn.init.normal_(self.residual_in.weight[codes:])
        near_uniform = 0.3 * (hidden_dim * code_dim) ** -0.5
        nn.init.normal_(self.anchor_out.weight, std=near_uniform)
        nn.init.zeros_(self.residual_out.weight)
        nn.init.zeros_(self.residual_out.bias)
        self.anchor_on(torch.randn(codes, code_dim))

    @property
    def pad(self) -> int:
        """Index of PAD."""
        return self.codes

    @torch.no_grad()
    def anchor_on(self, vectors: Tensor) -> None:
        """Take the tokenizer's code vectors [codes, code_dim], brought to zero mean and unit deviation."""
        if vectors.shape != self.vectors.shape:
            raise ConfigError(
                f"the code vectors are {tuple(vectors.shape)}, the language model expects "
                f"{tuple(self.vectors.shape)}; build it for this tokenizer"
            )
        centred = vectors.float() - vectors.float().mean(dim=0)
        self.vectors.copy_(centred / centred.std().clamp_min(1e-6))

    def embed(self, codes: Tensor) -> Tensor:
        """Return embeddings [..., embedding_dim] of codes [...] in 0..codes, PAD included."""
        padded = functional.pad(self.vectors, (0, 0, 0, 1))  # PAD has no vector of its own
        return self.anchor_in(functional.embedding(codes, padded)) + self.residual_in(codes)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., codes] of hidden states [..., hidden_dim]."""
        return self.anchor_out(hidden) @ self.vectors.T.to(hidden.dtype) + self.residual_out(hidden)


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DualTrackLMConfig:
    """Settings of the language model; the defaults are the paper's size, about 1B (P B.1.1)."""

    vocal_codes: int = 32_768
    accompaniment_codes: int = 32_768
    code_dim: int = 64  # width of the tokenizer's code vectors
    embedding_dim: int = 768  # width of one track's embedding before the projection (eq. 24)
    hidden_dim: int = 1536
    layers: int = 18
    heads: int = 12
    key_value_heads: int = 2
    feed_forward_dim: int = 8960
    rope_theta: float = 10_000.0
    attention_dropout: float = 0.0
    shared_positions: bool = True  # the target segment begins at position 0, as its prompt does
    aligned_source: bool = True  # a target step also carries the source's code of the frame it predicts
    gradient_checkpointing: bool = False
    # Reads the lead sheet that the band is shown out of the vocal; None: no sheet, as in the paper.
    sheet_reader: SheetReaderConfig | None = None
    band: BandConfig | None = None  # the styles it can be asked for; None: it is not told how to play

    def __post_init__(self) -> None:
        for name in ("code_dim", "embedding_dim", "hidden_dim", "layers", "heads", "key_value_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("vocal_codes", "accompaniment_codes"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.hidden_dim % self.heads or (self.hidden_dim // self.heads) % 2:
            raise ConfigError(
                f"hidden_dim {self.hidden_dim} must divide into {self.heads} heads of even width"
            )
        if self.heads % self.key_value_heads:
            raise ConfigError(f"key_value_heads {self.key_value_heads} must divide heads {self.heads}")
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout must be in [0, 1), got {self.attention_dropout}")

    @property
    def playing_sizes(self) -> tuple[int, ...]:
        """Number of values of each column of a sheet that tells how to play; none without a band."""
        return () if self.band is None else self.band.column_sizes()


class DualTrackLM(LanguageModel[DualTrackLMConfig]):
    """Predicts the next code of each track from frames of both (P B.1.2 to B.1.4)."""

    KIND = "lm"
    CONFIG = DualTrackLMConfig
    STORED = ("tokenizer_fingerprint",)

    def __init__(self, config: DualTrackLMConfig) -> None:
        super().__init__(config)
        self.tokenizer_fingerprint: str | None = None
        self._attention: AttentionChoice | None = None
        sizes = {"vocal": config.vocal_codes, "accompaniment": config.accompaniment_codes}
        widths = (config.code_dim, config.embedding_dim, config.hidden_dim)
        self.tracks = nn.ModuleDict({t: TrackCodes(sizes[t], *widths) for t in TRACKS})
        self.project = nn.Linear(len(TRACKS) * config.embedding_dim, config.hidden_dim)
        self.segments = nn.Embedding(SEGMENTS, config.hidden_dim)
        nn.init.normal_(self.segments.weight, std=0.5)
        self.backbone = Qwen2Backbone(
            dim=config.hidden_dim,
            layers=config.layers,
            heads=config.heads,
            groups=config.key_value_heads,
            feed_forward_dim=config.feed_forward_dim,
            rope_theta=config.rope_theta,
            dropout=config.attention_dropout,
        )
        self.sheet: LeadSheetEmbedding | None = None
        self.sheet_reader: SheetReader | None = None
        if config.sheet_reader is not None:
            self.sheet = LeadSheetEmbedding(config.hidden_dim, config.playing_sizes)
            # It is trained by itself, see recipes/lm/train_sheet_reader.
            self.sheet_reader = SheetReader(config.sheet_reader).eval().requires_grad_(False)

    @classmethod
    def for_tokenizer(cls, tokenizer: DuoTokenizer, config: DualTrackLMConfig) -> "DualTrackLM":
        """Return a new model for a tokenizer: its codebook sizes, its code vectors, its fingerprint."""
        vectors = {track: tokenizer.code_vectors(track) for track in TRACKS}
        sizes = {f"{track}_codes": len(each) for track, each in vectors.items()}
        model = cls(replace(config, **sizes, code_dim=vectors["vocal"].shape[1]))
        for track in TRACKS:
            model.codes_of(track).anchor_on(vectors[track])
        model.tokenizer_fingerprint = tokenizer.fingerprint
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.project.weight.device

    @property
    def pads(self) -> dict[str, int]:
        """PAD of each track: its number of codes."""
        return {track: self.codes_of(track).pad for track in TRACKS}

    def codes_of(self, track: str) -> TrackCodes:
        """Return the embedding table and head of a track."""
        if track not in TRACKS:
            raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {track!r}")
        codes = self.tracks[track]
        assert isinstance(codes, TrackCodes)
        return codes

    def lay_out(self, codes: dict[str, Tensor], mode: str, **options: Any) -> Layout:
        """Lay out codes as `layout.lay_out` does; a sheet that is not given is read out of the vocal."""
        if self.sheet_reader is not None and mode == "vocal_to_accompaniment" and "sheet" not in options:
            options["sheet"] = self.read_sheet(codes["vocal"])
        ways = {name: getattr(self.config, name) for name in ("aligned_source", "shared_positions")}
        return lay_out(codes, mode, pads=self.pads, **ways, **options)

    def train(self, mode: bool = True) -> "DualTrackLM":
        """Set the mode of all but the sheet reader, which is not trained here."""
        super().train(mode)
        if self.sheet_reader is not None:
            self.sheet_reader.eval()
        return self

    def read_sheet(self, codes: Tensor) -> Tensor | None:
        """Return the sheet of vocal codes, see `LanguageModel.read_sheet` and `SheetReader.read`."""
        return None if self.sheet_reader is None else self.sheet_reader.read(codes)

    def hear_sheet(self, codes: Tensor) -> dict[str, Tensor] | None:
        """Return what frames of vocal codes say, see `LanguageModel.hear_sheet`."""
        return None if self.sheet_reader is None else self.sheet_reader.listen(codes.to(self.device))

    @property
    def band(self) -> BandConfig | None:
        """The styles that it can be asked for, see `LanguageModel.band`."""
        return self.config.band

    def add_sheet_reader(self, reader: SheetReader) -> None:
        """Show lead sheets from now on, as this reader of the same tokenizer (or ConfigError) reads them."""
        if reader.tokenizer_fingerprint != self.tokenizer_fingerprint:
            raise ConfigError("the sheet reader is for another tokenizer; train it on the same tokens")
        self.config = replace(self.config, sheet_reader=reader.config)
        self.sheet_reader = reader.eval().requires_grad_(False).to(self.device)
        if self.sheet is None:
            self.sheet = LeadSheetEmbedding(self.config.hidden_dim).to(self.device)

    def add_band(self, band: BandConfig) -> None:
        """Be told how to play, in a band's styles and those it knows; ConfigError for no sheet."""
        if self.sheet is None:
            raise ConfigError("a model that plays from no lead sheet cannot be told how; set sheets.reader")
        known = self.config.band
        band = band if known is None else known.join(band)
        self.config = replace(self.config, band=band)
        styles = () if known is None else tuple(band.styles.index(style) for style in known.styles)
        told = LeadSheetEmbedding(self.config.hidden_dim, self.config.playing_sizes).to(self.device)
        told.learn_from(self.sheet, styles)
        self.sheet = told

    def embed(
        self, vocal: Tensor, accompaniment: Tensor, segment: Tensor, sheet: Tensor | None = None
    ) -> Tensor:
        """Return step inputs [..., hidden_dim] (eq. 24), with sheet [..., COLUMNS] where sheets are known."""
        both = [self.codes_of("vocal").embed(vocal), self.codes_of("accompaniment").embed(accompaniment)]
        inputs = self.project(torch.cat(both, dim=-1)) + self.segments(segment)
        return inputs if self.sheet is None or sheet is None else inputs + self.sheet(sheet)

    def forward(self, layout: Layout) -> dict[str, Tensor]:
        """Return {track: logits [batch, frames, codes]} of the frames of the target segment."""
        return self.predict(self.hidden_states(layout)[:, -layout.frames :])

    def predict(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return {track: logits [batch, steps, codes]} of states [batch, steps, hidden_dim]."""
        return {track: self.codes_of(track).logits(hidden) for track in TRACKS}

    def hidden_states(self, layout: Layout) -> Tensor:
        """Return the backbone's states [batch, steps, hidden_dim]; step i sees steps 0..i."""
        hidden = self.embed(layout.vocal, layout.accompaniment, layout.segment, layout.sheet)
        recompute = self.config.gradient_checkpointing and self.training
        kernel = self._choose_attention(hidden)
        return self.backbone(hidden, layout.position, kernel=kernel, recompute=recompute)

    @torch.no_grad()
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
        track: str = "accompaniment",
    ) -> Candidates:
        """Return one candidate of `track` per seed, all computed in one batch; see `LanguageModel.compose`.

        Codes are [frames] of the other track. However sure the reader of the lead sheet was, the band commits
        to it.
        """
        mode = mode_into(track)
        source, sampling = TRACKS[1 - TRACKS.index(track)], sampling or SamplingConfig()
        source_codes = self._check_codes(source_codes, source).to(self.device)
        given = torch.zeros(0).long() if prefix is None else self._check_codes(prefix, track)
        if not seeds or not len(source_codes):
            raise DataError("give at least one seed and one frame of source codes")
        frames = len(source_codes)
        stop = frames if stop is None else stop
        done = given[:stop].expand(len(seeds), -1).to(self.device)
        if done.shape[1] == stop:
            return Candidates(codes=done.cpu(), likelihood_nats=None, likelihood_alone_nats=None)
        if again is not None and (again.shape != (frames,) or bool((again >= torch.arange(frames)).any())):
            raise DataError(f"again must name an earlier frame of {frames}, or -1, for each of them")
        if sheet is not None:
            sheet = commit(check_sheet(sheet, frames, self.config.playing_sizes)).to(self.device)
        elif source == "vocal" and self.sheet_reader is not None:
            sheet = commit(self.sheet_reader.read(source_codes[None])[0])
        if sheet is not None:
            sheet = sheet.expand(len(seeds), -1, -1)
        if sheet is None or bool((sheet[..., PLAYING] == UNKNOWN).all()):
            sampling = replace(sampling, playing_guidance=1.0)
        uniform = torch.stack([draw_uniform(seed, frames) for seed in seeds]).to(self.device)
        codes, nats = sample_song(
            self._fuse(mode), source_codes, done, uniform, sampling, sheet, again, progress, stop, follow
        )
        nats = nats.cpu()
        alone = nats[-1] if sampling.guidance != 1.0 else None
        return Candidates(codes=codes.cpu(), likelihood_nats=nats[0], likelihood_alone_nats=alone)

    @torch.no_grad()
    def judge(
        self, source_codes: Tensor, codes: Tensor, *, first: int, sheet: Tensor | None = None
    ) -> Tensor:
        """Return how likely accompaniment codes are, see `LanguageModel.judge`; codes [rows, frames]."""
        vocal = self._check_codes(source_codes, "vocal").to(self.device)[None]
        if codes.ndim != 2 or codes.shape[1] != vocal.shape[1] or not 0 <= first < codes.shape[1]:
            raise DataError(f"{tuple(codes.shape)} codes from {first} on do not fit {vocal.shape[1]} frames")
        options: dict[str, Any] = {}
        if sheet is not None:
            options["sheet"] = commit(check_sheet(sheet, len(sheet), self.config.playing_sizes))[None]
        elif self.sheet_reader is not None:
            options["sheet"] = commit(self.sheet_reader.read(vocal))
        nats = []
        for row in codes:  # one by one, as their windows are long
            row = self._check_codes(row, "accompaniment").to(self.device)[None]
            layout = self.lay_out({"vocal": vocal, "accompaniment": row}, "vocal_to_accompaniment", **options)
            hidden = self.hidden_states(layout)[:, first - row.shape[1] :]
            likely = self.codes_of("accompaniment").logits(hidden).log_softmax(dim=-1)
            nats.append(likely.gather(2, row[:, first:, None]).mean())
        return torch.stack(nats).cpu()

    def _check_codes(self, codes: Tensor, track: str) -> Tensor:
        if codes.ndim != 1:
            raise DataError(f"{track} codes must be [frames], got shape {tuple(codes.shape)}")
        size = self.codes_of(track).codes
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= size):
            raise DataError(
                f"{track} codes must be in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}; "
                f"encode them with the tokenizer of this model"
            )
        return codes.long()

    def _fuse(self, mode: str) -> StepParts:
        """The weights that sampling in a mode needs, fused."""
        source, (target,) = MODES[mode]
        assert source is not None
        sources, targets = self._input_table(source), self._input_table(target)
        segments = self.segments.weight + self.project.bias
        head = self.codes_of(target)
        return StepParts(
            backbone=self.backbone,
            shared_positions=self.config.shared_positions,
            aligned_source=self.config.aligned_source,
            sources=sources,
            targets=targets + segments[TARGET_SEGMENT[mode]],
            prompt=targets[head.pad] + segments[PROMPT],
            head=head.vectors @ head.anchor_out.weight + head.residual_out.weight,
            head_bias=head.residual_out.bias,
            sheet=self.sheet,
        )

    def _input_table(self, track: str) -> Tensor:
        """What each code of a track and its PAD adds to a step's input [codes + 1, hidden_dim] (eq. 24)."""
        codes, width = self.codes_of(track), self.config.embedding_dim
        first = TRACKS.index(track) * width
        everything = torch.arange(codes.codes + 1, device=self.device)
        return functional.linear(codes.embed(everything), self.project.weight[:, first : first + width])

    def _choose_attention(self, hidden: Tensor) -> str:
        """The kernel that fits the inputs; it is said once which it is."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        choice = choose_attention(hidden.device, dtype, self.config.hidden_dim // self.config.heads)
        if choice != self._attention:
            self._attention = choice
            logger.info("attention: %s (%s)", choice.name, choice.reason)
        return choice.name
