"""A vocal goes in, an accompaniment comes out: wave -> codes -> codes -> latents -> wave.

accompanist = Accompanist.from_pretrained()
accompaniment = accompanist.accompany("song.wav", seed=1)
accompaniment.save("song-accompaniment")
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotok.lm.dual_track.choice import SamplingConfig
from duotok.lm.dual_track.sampling import Candidates, generate_candidates
from duotok.recipes.accompany.bundle import Bundle, load_bundle
from duotok.recipes.accompany.mix import mix_down
from duotok.recipes.accompany.output import OutputFolder, expected_files, write_result
from duotok.recipes.accompany.rank import Fit, TrackReading, measure_fit, rank, read_track
from duotok.recipes.accompany.report import describe_music
from duotok.recipes.accompany.settings import GenerationSettings, resolve_settings
from duotok.recipes.accompany.stages import STAGES, Progress, StageClock
from duotok.recipes.accompany.vocal import Vocal, load_prefix, load_vocal
from duotok.recipes.accompany.wishes import SheetWishes, describe_sheet, make_sheet
from duotok.tokenizer.common.errors import AudioError, ConfigError
from duotok.tokenizer.model import ReadOut

DEVICES = ("auto", "cpu", "cuda", "mps")
_CANDIDATES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One candidate before it is sound."""

    seed: int
    codes: Tensor  # [frames] accompaniment codes at 25 Hz
    told: ReadOut  # what they say, a batch of one on the CPU
    fit: Fit  # to the vocal


@dataclass(frozen=True, kw_only=True)
class Sketches:
    """All candidates for one vocal, ranked by their fit, and what rendering one needs to know."""

    ranked: Sequence[Composition]  # best first
    vocal: Vocal
    told: ReadOut  # what the vocal's codes say
    sheet: Tensor | None  # the lead sheet that the band plays from [frames, COLUMNS]
    settings: GenerationSettings
    prefix_frames: int  # how many codes were given
    clock: StageClock


@dataclass(frozen=True, kw_only=True)
class Accompaniment:
    """One result; both waves are 48 kHz stereo, as long as the vocal and below full scale."""

    accompaniment: Tensor  # [2, samples]
    mix: Tensor  # [2, samples], vocal and accompaniment
    codes: Tensor  # [frames] accompaniment codes at 25 Hz
    report: dict[str, Any]  # ready for JSON

    @property
    def score(self) -> float:
        """Coherence with the vocal as it sounds, higher is better."""
        return self.report["coherence"]["score"]

    def save(self, folder: str | Path) -> Path:
        """Write accompaniment.wav, mix.wav and report.json; nothing appears before all of it is written."""
        with OutputFolder(folder, expected_files(self.mix.shape[-1])) as output:
            write_result(output.work, self.accompaniment, self.mix, self.report)
            output.publish()
        return Path(folder)


class Accompanist:
    """Makes accompaniments with one loaded model."""

    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        self.bundle = bundle
        self.device = choose_device(device)
        bundle.tokenizer.to(self.device)
        bundle.lm.to(self.device)
        bundle.renderer.to(self.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None, *, device: str = "cpu") -> "Accompanist":
        """Load a bundle folder (None: the one that ships with the package); device: auto, cpu, cuda, mps."""
        return cls(load_bundle(folder), device)

    def accompany(
        self,
        vocal: str | Path | Tensor,
        *,
        seed: int = 0,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        steps: int | None = None,
        render_guidance: float | None = None,
        accompaniment_db: float | None = None,
        prefix: str | Path | Tensor | None = None,
        wishes: SheetWishes | None = None,
        progress: Progress | None = None,
    ) -> Accompaniment:
        """Make one accompaniment of a vocal (a file, or a wave [channels, samples] at 48 kHz).

        Settings that are None come from the bundle; see GenerationSettings. prefix: a given start of the
        accompaniment, shorter than the song; the model plays it and goes on. wishes: tempo and chords, where
        they are known. The same seed on the same machine gives the same samples. Raises AudioError and
        ConfigError for input that cannot be used.
        """
        settings = self.resolve_settings(
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            steps=steps,
            render_guidance=render_guidance,
            accompaniment_db=accompaniment_db,
        )
        made = self.vary(load_vocal(vocal), [seed], settings, prefix=prefix, wishes=wishes, progress=progress)
        return next(made)

    def resolve_settings(self, **chosen: Any) -> GenerationSettings:
        """The chosen settings; the bundle's own where they are None."""
        return resolve_settings(self.bundle.defaults, chosen)

    def vary(
        self,
        vocal: Vocal,
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        keep: int | None = None,
        prefix: str | Path | Tensor | None = None,
        wishes: SheetWishes | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Accompaniment]:
        """Make one accompaniment per seed, best first, one after the other, so that only one is in memory.

        keep: how many of the best are rendered; None renders all.
        """
        sketches = self.compose(vocal, seeds, settings, prefix=prefix, wishes=wishes, progress=progress)
        for composition in sketches.ranked[:keep]:
            yield self.perform(sketches, composition)

    def compose(
        self,
        vocal: Vocal,
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        prefix: str | Path | Tensor | None = None,
        wishes: SheetWishes | None = None,
        progress: Progress | None = None,
    ) -> Sketches:
        """Compose one candidate per seed and rank them by their codes; nothing is rendered yet."""
        bad = [seed for seed in seeds if not 0 <= seed < 2**63]
        if bad:
            raise ConfigError(f"a seed must be from 0 to 2^63 - 1, got {bad[0]}")
        clock = StageClock(progress)
        given = None if prefix is None else self._encode_prefix(prefix, vocal)
        with clock.stage("listen"):
            vocal_codes = self.bundle.tokenizer.encode(vocal.listened.to(self.device), "vocal")[0].cpu()
            told = self._read_out(vocal_codes, "vocal")
            sung = read_track(told, "vocal")
            rate_hz = self.bundle.tokenizer.frame_rate_hz
            sheet = make_sheet(self.bundle.lm, vocal_codes, rate_hz, wishes or SheetWishes())
        compositions: list[Composition] = []
        with clock.stage("compose"):
            for start in range(0, len(seeds), _CANDIDATES_AT_ONCE):
                together = seeds[start : start + _CANDIDATES_AT_ONCE]

                def tell(done: int, start: int = start, count: int = len(together)) -> None:
                    clock.tell("compose", (start + count * done / len(vocal_codes)) / len(seeds))

                candidates = generate_candidates(
                    self.bundle.lm,
                    vocal_codes,
                    seeds=together,
                    config=_sampling_config(settings),
                    prefix_codes=given,
                    sheet=sheet,
                    progress=tell,
                )
                compositions += self._judge(sung, together, candidates)
            order = rank([composition.fit for composition in compositions])
        return Sketches(
            ranked=[compositions[number] for number in order],
            vocal=vocal,
            told=told,
            sheet=sheet,
            settings=settings,
            prefix_frames=0 if given is None else len(given),
            clock=clock,
        )

    def _judge(self, sung: TrackReading, seeds: Sequence[int], candidates: Candidates) -> list[Composition]:
        """What the candidates' codes say and how that fits what is sung."""
        likelihood, information = candidates.likelihood_nats, candidates.information_nats
        compositions = []
        for number, seed in enumerate(seeds):
            codes = candidates.codes[number]
            told = self._read_out(codes, "accompaniment")
            fit = measure_fit(
                sung,
                read_track(told, "accompaniment"),
                likelihood_nats=None if likelihood is None else float(likelihood[number]),
                information_nats=None if information is None else float(information[number]),
            )
            compositions.append(Composition(seed=seed, codes=codes, told=told, fit=fit))
        return compositions

    def _encode_prefix(self, prefix: str | Path | Tensor, vocal: Vocal) -> Tensor:
        """Codes [k] of the given start; only whole frames count."""
        wave = load_prefix(prefix, vocal)
        hop = self.bundle.tokenizer.hop_samples
        whole = wave.shape[-1] // hop * hop
        if whole == 0:
            raise AudioError(f"the prefix has only {wave.shape[-1]} samples; give at least {hop} (0.04 s)")
        return self.bundle.tokenizer.encode(wave[:, :, :whole].to(self.device), "accompaniment")[0].cpu()

    def _read_out(self, codes: Tensor, track: str) -> ReadOut:
        """What codes [frames] stand for, as a batch of one on the CPU."""
        told = self.bundle.tokenizer.read_out(codes[None].to(self.device), track)
        return ReadOut(mel=told.mel.cpu(), chroma=told.chroma.cpu())

    def perform(self, sketches: Sketches, composition: Composition) -> Accompaniment:
        """Render a composition, set the level, listen to the result."""
        tokenizer, renderer = self.bundle.tokenizer, self.bundle.renderer
        vocal, settings, clock = sketches.vocal, sketches.settings, sketches.clock
        codes, samples = composition.codes, vocal.wave.shape[-1]
        with clock.stage("paint"):
            features = tokenizer.features(codes[None].to(self.device), "accompaniment")[0]
            latents = renderer.render_latents(
                features,
                steps=settings.steps,
                guidance=settings.render_guidance,
                seed=composition.seed,
                progress=clock.counter("paint", len(codes)),
            )
        with clock.stage("sound"):
            wave = renderer.decode(latents, samples, clock.counter("sound", latents.shape[-1])).cpu().float()
        if wave.shape != vocal.wave.shape or not bool(torch.isfinite(wave).all()):
            raise ConfigError("the model made no usable sound; choose milder settings or another --device")
        with clock.stage("mix"):
            mixdown = mix_down(vocal.wave, wave, accompaniment_db=settings.accompaniment_db)
            music = describe_music(
                vocal=vocal.wave,
                mixdown=mixdown,
                read_outs={"vocal": sketches.told, "accompaniment": composition.told},
            )
        report = {
            "vocal": vocal.name,
            **music,
            "lead_sheet": describe_sheet(sketches.sheet, tokenizer.frame_rate_hz),
            "ranking": composition.fit.describe(),
            "seed": composition.seed,
            "settings": asdict(settings),
            "prefix_seconds": round(sketches.prefix_frames / tokenizer.frame_rate_hz, 3),
            "model": {"name": self.bundle.name, "fingerprint": self.bundle.fingerprint},
            "device": str(self.device),
            "computing_seconds": {stage: round(clock.seconds[stage], 3) for stage in STAGES},
            "warnings": list(vocal.warnings),
        }
        return Accompaniment(accompaniment=mixdown.accompaniment, mix=mixdown.mix, codes=codes, report=report)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, then MPS, then the CPU."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if name not in available:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    if not available[name]:
        raise ConfigError(f"there is no {name} device here; use --device cpu")
    return torch.device(name)


def _sampling_config(settings: GenerationSettings) -> SamplingConfig:
    return SamplingConfig(
        guidance=settings.guidance,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )
