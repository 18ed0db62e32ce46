"""The dual-track language model: a Qwen2 backbone over frames of two codes (P 5.2, B.1)."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2Model

from ...tokenizer.common.component import Component
from ...tokenizer.common.errors import ConfigError
from ...tokenizer.model import DuoTokenizer
from ..sheet.columns import LeadSheetEmbedding
from ..sheet.reader import SheetReader, SheetReaderConfig
from .attention import AttentionChoice, choose_attention
from .codes import TrackCodes
from .layout import SEGMENTS, TRACKS, Layout, lay_out

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


class DualTrackLM(Component[DualTrackLMConfig]):
    """Predicts the next code of each track from frames of both (P B.1.2 to B.1.4)."""

    KIND = "lm"
    CONFIG = DualTrackLMConfig
    STORED = ("tokenizer_fingerprint",)

    def __init__(self, config: DualTrackLMConfig) -> None:
        super().__init__(config)
        self.tokenizer_fingerprint: str | None = None
        self._attention: AttentionChoice | None = None
        sizes = {"vocal": config.vocal_codes, "accompaniment": config.accompaniment_codes}
        self.tracks = nn.ModuleDict(
            {
                t: TrackCodes(sizes[t], config.code_dim, config.embedding_dim, config.hidden_dim)
                for t in TRACKS
            }
        )
        self.project = nn.Linear(len(TRACKS) * config.embedding_dim, config.hidden_dim)
        self.segments = nn.Embedding(SEGMENTS, config.hidden_dim)
        nn.init.normal_(self.segments.weight, std=0.5)
        self.backbone = _build_backbone(config)
        self.sheet: LeadSheetEmbedding | None = None
        self.sheet_reader: SheetReader | None = None
        if config.sheet_reader is not None:
            self.sheet = LeadSheetEmbedding(config.hidden_dim)
            # It is trained by itself, see recipes/lm/train_sheet_reader.
            self.sheet_reader = SheetReader(config.sheet_reader).eval().requires_grad_(False)

    @classmethod
    def for_tokenizer(cls, tokenizer: DuoTokenizer, config: DualTrackLMConfig) -> "DualTrackLM":
        """Return a new model for a tokenizer: its codebook sizes, its code vectors, its fingerprint."""
        vectors = {track: tokenizer.code_vectors(track) for track in TRACKS}
        config = replace(
            config,
            vocal_codes=len(vectors["vocal"]),
            accompaniment_codes=len(vectors["accompaniment"]),
            code_dim=vectors["vocal"].shape[1],
        )
        model = cls(config)
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
        """Lay out codes for this model; see `layout.lay_out` for the options.

        Where the band follows a vocal and no sheet is given, it is read out of that vocal.
        """
        if self.sheet_reader is not None and mode == "vocal_to_accompaniment" and "sheet" not in options:
            options["sheet"] = self.read_sheet(codes["vocal"])
        return lay_out(
            codes,
            mode,
            pads=self.pads,
            aligned_source=self.config.aligned_source,
            shared_positions=self.config.shared_positions,
            **options,
        )

    def train(self, mode: bool = True) -> "DualTrackLM":
        """Set the mode of all but the sheet reader, which is not trained here."""
        super().train(mode)
        if self.sheet_reader is not None:
            self.sheet_reader.eval()
        return self

    def read_sheet(self, vocal: Tensor, **limits: Any) -> Tensor | None:
        """Return the sheet [batch, frames, COLUMNS] of vocal codes [batch, frames]; see `SheetReader.read`.

        None where this model knows no sheets.
        """
        return None if self.sheet_reader is None else self.sheet_reader.read(vocal, **limits)

    def add_sheet_reader(self, reader: SheetReader) -> None:
        """Show lead sheets from now on, as this reader reads them; what they say has still to be learned.

        Raises ConfigError unless the reader is for the same tokenizer.
        """
        if reader.tokenizer_fingerprint != self.tokenizer_fingerprint:
            raise ConfigError("the sheet reader is for another tokenizer; train it on the same tokens")
        self.config = replace(self.config, sheet_reader=reader.config)
        self.sheet_reader = reader.eval().requires_grad_(False).to(self.device)
        if self.sheet is None:
            self.sheet = LeadSheetEmbedding(self.config.hidden_dim).to(self.device)

    def embed(
        self, vocal: Tensor, accompaniment: Tensor, segment: Tensor, sheet: Tensor | None = None
    ) -> Tensor:
        """Return step inputs [..., hidden_dim]: embed each code, concatenate, project (eq. 24).

        sheet [..., COLUMNS] adds to them in a model that knows sheets.
        """
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
        self._choose_attention(hidden)
        # The layers are called one by one because Qwen2Model.forward takes positions that start again
        # for packed sequences and would hide the prompt from the target.
        rotary = self.backbone.rotary_emb(hidden, layout.position)
        for layer in self.backbone.layers:
            if self.config.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, None, position_embeddings=rotary, use_reentrant=False)
            else:
                hidden = layer(hidden, None, position_embeddings=rotary)
        return self.backbone.norm(hidden)

    def _choose_attention(self, hidden: Tensor) -> None:
        """Use the kernel that fits the inputs, and say once which it is."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        choice = choose_attention(hidden.device, dtype, self.config.hidden_dim // self.config.heads)
        if choice == self._attention:
            return
        self._attention = choice
        logger.info("attention: %s (%s)", choice.name, choice.reason)
        if self.backbone.config._attn_implementation != choice.name:
            self.backbone.set_attn_implementation(choice.name)


def _build_backbone(config: DualTrackLMConfig) -> Qwen2Model:
    backbone = Qwen2Model(
        Qwen2Config(
            vocab_size=1,
            hidden_size=config.hidden_dim,
            intermediate_size=config.feed_forward_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_dropout=config.attention_dropout,
            use_cache=False,
        )
    )
    backbone.set_input_embeddings(nn.Identity())  # the input comes embedded, from two tables
    return backbone
