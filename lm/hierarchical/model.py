"""AccompGen: three stages, one after the other, compose the codes of a codec for the codes of a vocal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...tokenizer.common.errors import CheckpointError, ConfigError, DataError
from ...tokenizer.layered import pack_codes, semantic_rows, unpack_codes
from ..contract import Candidates, LanguageModel, SamplingConfig
from ..sheet.playing import BandConfig
from .drawing import draw_song
from .stage import Stage, StageConfig, StreamConfig

STAGES = ("semantic", "coarse", "fine")  # what each writes; it hears what the one before wrote


@dataclass(frozen=True, kw_only=True)
class HierarchicalLMConfig:
    """Settings of the three stages."""

    semantic: StageConfig = field(default_factory=StageConfig)
    coarse: StageConfig = field(default_factory=StageConfig)
    fine: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self) -> None:
        for before, after in (("semantic", "coarse"), ("coarse", "fine")):
            written, heard = getattr(self, before).target, getattr(self, after).source
            if written != heard:
                raise ConfigError(f"the {after} stage hears {heard}, but the {before} stage writes {written}")
        if self.coarse.target.rate_hz != self.fine.target.rate_hz:
            raise ConfigError("the coarse and the fine stage must write codes of one codec, at one rate")
        if self.coarse.target.codebook_size != self.fine.target.codebook_size:
            raise ConfigError("the coarse and the fine stage must write codes of one codec, of one size")


class HierarchicalLM(LanguageModel[HierarchicalLMConfig]):
    """Vocal semantic tokens -> instrumental semantic -> coarse -> fine acoustic tokens.

    The accompaniment's codes are packed, see `duotok.tokenizer.layered`: semantic rows, then the codec's
    codebooks, all at the codec's rate.
    """

    KIND = "hierarchical_lm"
    CONFIG = HierarchicalLMConfig
    STORED = ("tokenizer_fingerprint", "codec_fingerprint")

    def __init__(self, config: HierarchicalLMConfig) -> None:
        super().__init__(config)
        self.tokenizer_fingerprint: str | None = None  # of the semantic tokenizer
        self.codec_fingerprint: str | None = None
        self.stages = nn.ModuleDict({name: Stage(getattr(config, name)) for name in STAGES})

    @classmethod
    def join(cls, stages: Sequence[Stage]) -> "HierarchicalLM":
        """Return the model of three trained stages; CheckpointError where they do not belong together."""
        found = {stage.stage: stage for stage in stages}
        if sorted(map(str, found)) != sorted(STAGES):
            raise CheckpointError(
                f"give one stage each of {', '.join(STAGES)}, got {', '.join(map(str, found))}"
            )
        for name in ("semantic_fingerprint", "codec_fingerprint"):
            prints = {stage: getattr(found[stage], name) for stage in STAGES}
            if len(set(prints.values())) > 1:
                told = ", ".join(f"{stage} on {value}" for stage, value in prints.items())
                raise CheckpointError(
                    f"the stages were trained on other tokens ({told}); train them on one folder of tokens"
                )
        model = cls(HierarchicalLMConfig(**{name: found[name].config for name in STAGES}))
        for name in STAGES:
            model.stage_of(name).load_state_dict(found[name].state_dict())
        model.tokenizer_fingerprint = stages[0].semantic_fingerprint
        model.codec_fingerprint = stages[0].codec_fingerprint
        return model.eval()

    def stage_of(self, name: str) -> Stage:
        """Return a stage by its name."""
        stage = self.stages[name]
        assert isinstance(stage, Stage)
        return stage

    @property
    def band(self) -> BandConfig | None:
        """None: it is not told how to play."""
        return None

    def read_sheet(self, codes: Tensor) -> Tensor | None:
        """None: it plays from no lead sheet."""
        return None

    def hear_sheet(self, codes: Tensor) -> dict[str, Tensor] | None:
        """None: it plays from no lead sheet."""
        return None

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
    ) -> Candidates:
        """Return one candidate per seed; see `LanguageModel.compose`.

        source_codes: semantic codes of the vocal [frames]; prefix and candidates: packed codes [rows, k]. The
        length of windows is the stages' own, not that of `sampling`. Likelihoods are of the semantic stage,
        the one that hears the singer. Raises ConfigError where a lead sheet is given.
        """
        sampling = sampling or SamplingConfig()
        if sheet is not None or again is not None:
            raise ConfigError("this model plays from no lead sheet; leave it out")
        if source_codes.ndim != 1 or not len(source_codes) or not seeds:
            raise DataError(
                f"give at least one seed and semantic codes [frames], got {tuple(source_codes.shape)}"
            )
        stages = [self.stage_of(name) for name in STAGES]
        vocal = stages[0].config.source
        codes = vocal.check(source_codes[None, None], "vocal").to(stages[0].device)
        seconds = len(source_codes) / vocal.rate_hz
        streams = [stage.config.target for stage in stages]
        end = seconds if stop is None else min(seconds, stop / streams[1].rate_hz)
        frames = [stream.frames(end) for stream in streams]
        given = self._split_prefix(prefix, end)
        shapes = [(stream.levels, length) for stream, length in zip(streams, frames, strict=True)]
        draws = [_draw_uniform(seed, shapes) for seed in seeds]
        steps = sum(
            levels * (length - start.shape[2]) for (levels, length), start in zip(shapes, given, strict=True)
        )
        taken = 0

        def tell(more: int) -> None:
            nonlocal taken
            taken += more
            if progress is not None:
                progress(taken * len(source_codes) // steps)

        heard, written = codes.expand(len(seeds), -1, -1), []
        likely: Tensor | None = None
        for number, (stage, start, length) in enumerate(zip(stages, given, frames, strict=True)):
            uniform = torch.stack([draw[number] for draw in draws]).to(codes.device)
            start = start.expand(len(seeds), -1, -1).to(codes.device)
            heard, nats = draw_song(stage, heard, start, length, uniform, sampling, tell)
            written.append(heard)
            likely = nats.cpu() if likely is None else likely
        acoustic = torch.cat(written[1:], dim=1)
        rates = streams[0].rate_hz, streams[1].rate_hz
        packed = torch.stack(
            [
                pack_codes(own[0], codec, semantic_hz=rates[0], codec_hz=rates[1])
                for own, codec in zip(written[0].cpu(), acoustic.cpu(), strict=True)
            ]
        )
        if follow is not None:
            follow(packed)
        is_new = given[0].shape[2] < frames[0]
        return Candidates(
            codes=packed,
            likelihood_nats=likely[0] if is_new and likely is not None else None,
            likelihood_alone_nats=likely[1] if is_new and likely is not None and len(likely) > 1 else None,
        )

    @torch.no_grad()
    def judge(
        self, source_codes: Tensor, codes: Tensor, *, first: int, sheet: Tensor | None = None
    ) -> Tensor:
        """Return how likely the semantic codes of packed rows are; see `LanguageModel.judge`.

        codes: [candidates, rows, frames], `first` one of their frames.
        """
        stage, parts = self.stage_of("semantic"), [self._split_prefix(row, torch.inf)[0] for row in codes]
        target = torch.cat(parts).to(stage.device)
        stream, codec = stage.config.target, self.stage_of("coarse").config.target
        source = stage.config.source.check(source_codes[None, None], "vocal").to(stage.device)
        known = torch.ones(len(target), dtype=torch.bool, device=stage.device)
        likely = stage(source.expand(len(target), -1, -1), target, known).log_softmax(dim=-1)
        picked = likely.gather(3, target[..., None])[..., 0]
        return picked[:, :, stream.frames(first / codec.rate_hz) :].mean(dim=(1, 2)).cpu()

    def _split_prefix(self, prefix: Tensor | None, seconds: float) -> list[Tensor]:
        """Return the codes that each stage is given, [1, levels, k]; none of them without a prefix."""
        streams = [self.stage_of(name).config.target for name in STAGES]
        semantic, coarse, fine = streams
        if prefix is None:
            return [torch.zeros(1, stream.levels, 0, dtype=torch.int64) for stream in streams]
        rows = semantic_rows(semantic.rate_hz, coarse.rate_hz)
        wanted = rows + coarse.levels + fine.levels
        if prefix.ndim != 2 or len(prefix) != wanted:
            raise DataError(
                f"the given start has codes {tuple(prefix.shape)}, this model's are [{wanted}, frames]; "
                "encode it with the tokenizers of this model"
            )
        own, codec = unpack_codes(prefix, semantic_hz=semantic.rate_hz, codec_hz=coarse.rate_hz)
        parts = (own[None], *codec.split([coarse.levels, fine.levels]))
        return [
            stream.check(codes[None, :, : stream.frames(min(seconds, codes.shape[1]))], "given")
            for stream, codes in zip(streams, parts, strict=True)
        ]


def _draw_uniform(seed: int, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The numbers in [0, 1) that a candidate's tokens are drawn by, one tensor [levels, frames] a stage."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for shape in shapes]


def scale_streams(
    config: StageConfig, stage: str, *, semantic: StreamConfig, codec: StreamConfig, coarse_levels: int
) -> StageConfig:
    """Return a stage's settings with the streams of these tokenizers; ConfigError without a fine level."""
    if stage not in STAGES:
        raise ConfigError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    if not 0 < coarse_levels < codec.levels:
        raise ConfigError(
            f"coarse_levels must be in 1..{codec.levels - 1} for a codec of {codec.levels} codebooks, got "
            f"{coarse_levels}"
        )
    coarse, fine = replace(codec, levels=coarse_levels), replace(codec, levels=codec.levels - coarse_levels)
    streams = [semantic, semantic, coarse, fine]
    place = STAGES.index(stage)
    return replace(config, source=streams[place], target=streams[place + 1])
