"""A vocal goes in, an accompaniment comes out: wave -> codes -> codes -> latents -> wave.

accompanist = Accompanist.from_pretrained()
accompaniment = accompanist.accompany("song.wav", seed=1)
accompaniment.save("song-accompaniment")
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotok.lm.sampling import SamplingConfig, generate_candidates
from duotok.recipes.bundle import Bundle, load_bundle
from duotok.recipes.loudness import mix_down
from duotok.recipes.output import OutputFolder, write_result
from duotok.recipes.report import describe_music
from duotok.recipes.settings import GenerationSettings, resolve_settings
from duotok.recipes.vocal import Vocal, load_prefix, load_vocal
from duotok.tokenizer.common.errors import AudioError, ConfigError
from duotok.tokenizer.model import ReadOut

STAGES = ("listen", "compose", "paint", "sound", "mix")
Progress = Callable[[str, float], None]  # stage, share of it that is done (0 to 1)
DEVICES = ("auto", "cpu", "cuda", "mps")
_CANDIDATES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Accompaniment:
    """One result; both waves are 48 kHz stereo, as long as the vocal and below full scale."""

    accompaniment: Tensor  # [2, samples]
    mix: Tensor  # [2, samples], vocal and accompaniment
    codes: Tensor  # [frames] accompaniment codes at 25 Hz
    report: dict[str, Any]  # ready for JSON

    @property
    def score(self) -> float:
        """Coherence with the vocal, higher is better."""
        return self.report["coherence"]["score"]

    def save(self, folder: str | Path) -> Path:
        """Write accompaniment.wav, mix.wav and report.json; nothing appears before all of it is written."""
        with OutputFolder(folder) as output:
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
        progress: Progress | None = None,
    ) -> Accompaniment:
        """Make one accompaniment of a vocal (a file, or a wave [channels, samples] at 48 kHz).

        Settings that are None come from the bundle; see GenerationSettings. prefix: a given start of the
        accompaniment, shorter than the song; the model plays it and goes on. The same seed on the same
        machine gives the same samples. Raises AudioError and ConfigError for input that cannot be used.
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
        return next(self.vary(load_vocal(vocal), [seed], settings, prefix=prefix, progress=progress))

    def resolve_settings(self, **chosen: Any) -> GenerationSettings:
        """The chosen settings; the bundle's own where they are None."""
        return resolve_settings(self.bundle.defaults, chosen)

    def vary(
        self,
        vocal: Vocal,
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        prefix: str | Path | Tensor | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Accompaniment]:
        """Make one accompaniment per seed, one after the other, so that only one is in memory."""
        bad = [seed for seed in seeds if not 0 <= seed < 2**63]
        if bad:
            raise ConfigError(f"a seed must be from 0 to 2^63 - 1, got {bad[0]}")
        clock = _Clock(progress)
        given = None if prefix is None else self._encode_prefix(prefix, vocal)
        with clock.stage("listen"):
            vocal_codes = self.bundle.tokenizer.encode(vocal.listened.to(self.device), "vocal")[0].cpu()
            told = self._read_out(vocal_codes, "vocal")
        heard = clock.seconds
        for start in range(0, len(seeds), _CANDIDATES_AT_ONCE):
            together = seeds[start : start + _CANDIDATES_AT_ONCE]
            clock.seconds = dict(heard)
            with clock.stage("compose"):
                candidates = self._compose(vocal_codes, together, settings, given, clock)
            composed = clock.seconds
            for seed, codes in zip(together, candidates, strict=True):
                clock.seconds = dict(composed)
                yield self._perform(vocal, told, codes, seed, settings, clock, given)

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

    def _compose(
        self,
        vocal_codes: Tensor,
        seeds: Sequence[int],
        settings: GenerationSettings,
        given: Tensor | None,
        clock: "_Clock",
    ) -> Tensor:
        """Accompaniment codes [candidates, frames]."""
        config = SamplingConfig(
            guidance=settings.guidance,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        return generate_candidates(
            self.bundle.lm,
            vocal_codes,
            seeds=list(seeds),
            config=config,
            prefix_codes=given,
            progress=lambda done: clock.tell("compose", done / len(vocal_codes)),
        )

    def _perform(
        self,
        vocal: Vocal,
        told: ReadOut,
        codes: Tensor,
        seed: int,
        settings: GenerationSettings,
        clock: "_Clock",
        given: Tensor | None,
    ) -> Accompaniment:
        """Render codes [frames], set the level, listen to the result; told: what the vocal's codes say."""
        tokenizer, renderer = self.bundle.tokenizer, self.bundle.renderer
        samples = vocal.wave.shape[-1]
        with clock.stage("paint"):
            features = tokenizer.features(codes[None].to(self.device), "accompaniment")[0]
            latents = renderer.render_latents(
                features,
                steps=settings.steps,
                guidance=settings.render_guidance,
                seed=seed,
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
                read_outs={"vocal": told, "accompaniment": self._read_out(codes, "accompaniment")},
            )
        report = {
            "vocal": vocal.name,
            **music,
            "seed": seed,
            "settings": asdict(settings),
            "prefix_seconds": 0.0 if given is None else round(len(given) / tokenizer.frame_rate_hz, 3),
            "model": {"name": self.bundle.name, "fingerprint": self.bundle.fingerprint},
            "device": str(self.device),
            "computing_seconds": {stage: round(value, 3) for stage, value in clock.seconds.items()},
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


class _Clock:
    """Measures the stages and passes their progress on."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.tell(name, 0.0)
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self.tell(name, 1.0)

    def tell(self, name: str, share: float) -> None:
        if self._progress is not None:
            self._progress(name, min(share, 1.0))

    def counter(self, name: str, total: int) -> Callable[[int], None]:
        """A callback that is given how much was added."""
        done = 0

        def add(amount: int) -> None:
            nonlocal done
            done += amount
            self.tell(name, done / total)

        return add
