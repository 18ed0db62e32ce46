"""A vocal goes in, an accompaniment comes out: wave -> codes -> codes -> latents -> wave.

accompanist = Accompanist.from_pretrained()
accompaniment = accompanist.accompany("song.wav", seed=1)
accompaniment.save("song-accompaniment")
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from duotok.lm.contract import Candidates, SamplingConfig
from duotok.lm.sheet.plan import SongPlan
from duotok.recipes.accompany.arrangement import Arrangement, begin_band, describe_band, settle_band
from duotok.recipes.accompany.bundle import Bundle, load_bundle
from duotok.recipes.accompany.export import (
    Outline,
    bring_notes_back,
    cast_parts,
    find_sung_notes,
    place_on_grid,
    write_exports,
)
from duotok.recipes.accompany.hearing import describe_length, describe_music, rounded
from duotok.recipes.accompany.mix import (
    Vocal,
    check_vocal,
    find_fade,
    join_prefix,
    level_parts,
    mix_down,
    warn_of_level,
)
from duotok.recipes.accompany.original import Take, describe_recording
from duotok.recipes.accompany.output import FORMATS, OutputFolder, expected_files, write_report
from duotok.recipes.accompany.rank import (
    Composition,
    TrackReading,
    measure_fit,
    measure_pulse,
    rank,
    read_track,
)
from duotok.recipes.accompany.repaint import (
    Repainting,
    begin_stretch,
    compose_stretch,
    describe_stretch,
    join_stretch,
    paint_stretch,
    sound_stretch,
)
from duotok.recipes.accompany.request import (
    DEVICES,
    INSTALLED,
    OWN_SEPARATOR,
    GenerationSettings,
    Request,
    resolve_settings,
)
from duotok.recipes.accompany.stages import STAGES, Progress, StageClock
from duotok.recipes.accompany.stream import StretchRenderer, WavStream, find_level
from duotok.recipes.accompany.tune import bring_back, bring_to_pitch, find_pitch_clock
from duotok.recipes.accompany.wishes import (
    SheetWishes,
    find_beats,
    keep_rests,
    make_plan,
)
from duotok.recipes.separation.adapters import open_separator
from duotok.recipes.separation.stems import Separator
from duotok.renderer.sound_font import Players
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError
from duotok.tokenizer.common.long_waves import peak
from duotok.tokenizer.common.loudness import measure_loudness
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.pitch import sung_pitch
from duotok.tokenizer.music.score_reader import Note, Score
from duotok.tokenizer.music.tuning import PitchClock

_CANDIDATES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Sketches:
    """All candidates for one request, ranked by their fit, and what rendering one needs to know."""

    ranked: Sequence[Composition]  # best first
    request: Request  # with its files read
    settings: GenerationSettings
    vocal: Vocal  # the one given, or separated from the mix
    pitched: Vocal  # the same at A = 440 Hz, to which everything is composed
    pitch_clock: PitchClock | None  # from one to the other; None: they are the same
    tuning: Mapping[str, Any]  # what the report says of it
    vocal_codes: Tensor  # [frames]
    told: ReadOut  # what they say
    pitches: np.ndarray  # sung MIDI pitch at PITCH_RATE_HZ, NaN where nothing is sung
    plan: SongPlan | None  # that the band plays from
    intro_seconds: float  # by how much all of it is longer than what was given
    arrangement: Arrangement | None  # of the plan
    prefix_frames: int  # how many codes were given
    separator: Separator | None  # where the mix or stems ask for one
    players: Players | None  # where the score is played as well
    clock: "StageClock"


@dataclass(frozen=True, kw_only=True)
class Accompaniment:
    """One result; both waves are 48 kHz stereo, as long as the vocal and below full scale."""

    accompaniment: Tensor  # [2, samples], its last quarter of a second faded out
    mix: Tensor  # [2, samples], vocal and accompaniment
    take: Take  # what was played, and by which gains it is heard
    report: dict[str, Any]  # ready for JSON
    stems: Mapping[str, Tensor] = field(default_factory=dict)  # drums, bass, other [2, samples], if asked for
    played: Mapping[str, Tensor] = field(default_factory=dict)  # parts [2, samples] by a font, if asked for
    separated_vocal: Tensor | None = None  # [2, samples], of a mix
    format: str = "wav"  # that it is written in, one of FORMATS
    exports: tuple[str, ...] = ()  # see Request.export
    notes: Score = field(default_factory=dict)  # what the band plays, if it is exported
    melody: Sequence[Note] = ()  # what is sung, if it is exported

    @property
    def codes(self) -> Tensor:
        """Accompaniment codes [frames], or [rows, frames]."""
        return self.take.codes

    @property
    def score(self) -> float:
        """Coherence with the vocal as it sounds, higher is better."""
        return self.report["coherence"]["score"]

    def save(self, folder: str | Path) -> Path:
        """Write the accompaniment, the mix and report.json; nothing appears before all of it is written.

        Stems and a separated vocal, where there are any, go into files of their own.
        """
        separated = self.separated_vocal is not None
        options = {
            "stems": bool(self.stems),
            "separated": separated,
            "format": self.format,
            "exports": self.exports,
            "played": bool(self.played),
        }
        expected = expected_files(self.mix.shape[-1], **options)
        with OutputFolder(folder, expected) as output:
            self.write(output.work)
            output.publish()
        return Path(folder)

    def write(self, folder: Path, suffix: str = "") -> dict[str, Any]:
        """Write the files of `save` into an existing folder (no report.json with a suffix)."""
        report = self.report
        ending, subtype, _ = FORMATS[self.format]
        if self.stems:
            names = {stem: f"accompaniment-{stem}{suffix}.wav" for stem in self.stems}
            report = {**report, "stems": names}
            for stem, wave in self.stems.items():
                # Floats: the sum stays exact, and a stem may exceed full scale where two of them cancel.
                write_audio(folder / names[stem], wave, subtype="FLOAT")
        if self.played:
            report = {**report, "played": {part: f"played-{part}{suffix}.wav" for part in self.played}}
            for part, wave in self.played.items():
                write_audio(folder / report["played"][part], wave, subtype="FLOAT")
            together = torch.stack(list(self.played.values())).sum(dim=0)
            write_audio(folder / f"played{suffix}{ending}", together, subtype=subtype)
        if self.separated_vocal is not None:
            write_audio(folder / f"separated-vocal{ending}", self.separated_vocal, subtype=subtype)
        write_audio(folder / f"accompaniment{suffix}{ending}", self.accompaniment, subtype=subtype)
        write_audio(folder / f"mix{suffix}{ending}", self.mix, subtype=subtype)
        self.take.write(folder / f"codes{suffix}.safetensors")
        if self.exports:
            write_exports(self.exports, folder, suffix, report, self.notes, self.melody)
        if not suffix:
            write_report(folder, report)
        return report


class Accompanist:
    """Makes accompaniments with one loaded model."""

    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        self.device = choose_device(device)
        self.bundle = bundle
        self.defaults = resolve_settings(bundle.defaults, {}, where=f"defaults of the model {bundle.name}")
        for part in (bundle.tokens, bundle.lm, bundle.sound, bundle.score_reader):
            if part is not None:
                part.to(self.device)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | None = None, *, revision: str | None = None, device: str = "cpu"
    ) -> "Accompanist":
        """Load a bundle folder, or "owner/name" of the hub at a revision (None: the one in the package).

        device: auto, cpu, cuda, mps. Raises CheckpointError and ConfigError.
        """
        found = choose_device(device)  # one that is missing is told before the model is loaded
        return cls(load_bundle(folder, revision=revision), str(found))

    def accompany(
        self, asked: Request | str | Path | Tensor, *, progress: Progress | None = None, **fields: Any
    ) -> Accompaniment:
        """Make the accompaniment that fits best: of a request, or of a vocal and other fields of Request.

        The same seed on the same machine gives the same samples. Raises AudioError, ConfigError and DataError
        for what cannot be used.
        """
        return next(self.vary(asked, progress=progress, **fields))

    def repaint(
        self,
        original: str | Path,
        stretch: tuple[float, float],
        vocal: str | Path | Tensor,
        *,
        progress: Progress | None = None,
        **fields: Any,
    ) -> Accompaniment:
        """Compose a stretch of an earlier result of a vocal anew (its folder; seconds), the rest as it is.

        fields: of Request; chords, style and without hold for the stretch. Raises as `accompany` does.
        """
        request = Request(vocal=vocal, original=original, repaint=stretch, **fields)
        return self.accompany(request, progress=progress)

    def vary(
        self, asked: Request | str | Path | Tensor, *, progress: Progress | None = None, **fields: Any
    ) -> Iterator[Accompaniment]:
        """Make all accompaniments that are asked for, best first, so that only one is in memory at a time."""
        sketches = self.compose(asked, progress=progress, **fields)
        for composition in sketches.ranked[: sketches.request.renderings]:
            yield self.perform(sketches, composition)

    def write(self, request: Request, folder: Path, **options: Any) -> dict[str, Any]:
        """Write all that is asked for into an existing folder; give back the report that is left there.

        Several accompaniments are numbered by rank, and the best is also there without a number. options: of
        `compose`.
        """
        return self.write_sketches(self.compose(request, **options), folder)

    def write_sketches(self, sketches: Sketches | Repainting, folder: Path) -> dict[str, Any]:
        """The same of what has been composed."""
        request = sketches.request
        count, ending = request.renderings, FORMATS[request.format or "wav"][0]
        suffixes = [""] if count == 1 else [f"-{rank}" for rank in range(1, count + 1)]
        reports = [
            self.perform(sketches, composition).write(folder, suffix)
            for composition, suffix in zip(sketches.ranked, suffixes, strict=False)
        ]
        copied = {"accompaniment": ending, "mix": ending, "codes": ".safetensors"}
        for kind, end in copied.items() if count > 1 else ():
            try:
                shutil.copyfile(folder / f"{kind}-1{end}", folder / f"{kind}{end}")
            except OSError as error:
                raise AudioError(f"cannot write {kind}{end}: {error.strerror or error}") from error
        report = reports[0]
        if request.variations > 1:
            files = [
                {"rank": number, **{kind: f"{kind}{suffix}{ending}" for kind in ("accompaniment", "mix")}}
                for number, suffix in enumerate(suffixes, start=1)
            ]
            report = {**report, "variations": [{**a, **b} for a, b in zip(files, reports, strict=True)]}
        if len(sketches.ranked) > 1:
            not_rendered = [
                {
                    "rank": number,
                    "seed": composition.seed,
                    "style": composition.style,
                    "ranking": composition.fit.describe(),
                }
                for number, composition in enumerate(sketches.ranked[count:], start=count + 1)
            ]
            report = {**report, "not_rendered": not_rendered}
            write_report(folder, report)
        return report

    def compose(
        self,
        asked: Request | str | Path | Tensor,
        *,
        progress: Progress | None = None,
        stream: WavStream | None = None,
        **fields: Any,
    ) -> Sketches | Repainting:
        """Compose the candidates of a request and rank them by their codes; nothing is rendered yet.

        But for what goes into the stream meanwhile: see `StretchRenderer`.
        """
        request = replace(asked, **fields) if isinstance(asked, Request) else Request(vocal=asked, **fields)
        request = settle_band(request.read(), self.bundle.lm.band)
        settings = request.settings(self.bundle.defaults)
        if self.bundle.score_reader is None and ("midi" in request.export or request.play is not None):
            option = "--play" if request.play is not None else "midi of --export"
            raise ConfigError(f"this model reads no score out of what it plays; leave out {option}")
        self.bundle.sound.refuse_settings(steps=request.steps, render_guidance=request.render_guidance)
        separator = self._open_separator(request)
        clock = StageClock(progress)
        if request.repaint is not None:
            if stream is not None:
                raise ConfigError("a stretch that is painted anew is not streamed; leave out --stream")
            return self._compose_stretch(request, settings, separator, clock)
        players, no_players = find_players(request.play)
        with clock.stage("listen"):
            vocal = _find_vocal(request, separator)
            vocal, wishes, intro = self._lead_in(vocal, request)
            pitches, seconds = sung_pitch(vocal.wave), vocal.wave.shape[-1] / SAMPLE_RATE_HZ
            pitch_clock, tuning = find_pitch_clock(pitches, seconds, request.tuning)
            pitched, prefix = vocal, request.prefix
            if pitch_clock is not None:
                pitched = replace(vocal, wave=pitch_clock.bring_to_pitch(vocal.wave))
                prefix = pitch_clock.bring_to_pitch(prefix) if isinstance(prefix, Tensor) else None
                wishes = bring_to_pitch(wishes, pitch_clock)
                pitches = sung_pitch(pitched.wave)
            given = None if prefix is None else self._encode_prefix(prefix)
            vocal_codes = self.bundle.tokens.encode(pitched.listened.to(self.device), "vocal")[0].cpu()
            rate_hz = self.bundle.tokens.frame_rate_hz
            played = prefix if isinstance(prefix, Tensor) else None
            with ThreadPoolExecutor(1) as beside:  # the plan, which takes a core by itself
                reading = beside.submit(self._read_out, vocal_codes, "vocal", pitched.listened)
                singing = beside.submit(lambda: read_track(reading.result(), "vocal"))
                plan = make_plan(self.bundle.lm, vocal_codes, pitches, rate_hz, wishes, played)
            told, sung = reading.result(), singing.result()
            if (request.export or players is not None) and plan is None:
                raise ConfigError("this model plays from no lead sheet; leave out --export and --play")
            arrangement = plan and Arrangement(plan=plan, band=self.bundle.lm.band, request=request)
            confused = () if plan is None else plan.warnings
            vocal = replace(vocal, warnings=(*vocal.warnings, *wishes.warnings, *confused, *no_players))
        seeds = _count_seeds(request, settings)
        styles = arrangement.draw_styles(len(seeds)) if arrangement is not None else [None] * len(seeds)
        sampling = _choose_sampling(settings)
        compositions: list[Composition] = []
        follow = stream and StretchRenderer(
            stream=stream,
            bundle=self.bundle,
            device=self.device,
            request=request,
            settings=settings,
            seeds=seeds[:_CANDIDATES_AT_ONCE],
            styles=styles,
            judge=partial(self._judge, sung),
            vocal=vocal.wave,
            clock=pitch_clock,
            frames=vocal_codes.shape[-1],
            plan=plan,
            arrangement=arrangement,
            prefix_frames=0 if given is None else given.shape[-1],
        )
        with clock.stage("compose"):
            for start in range(0, len(seeds), _CANDIDATES_AT_ONCE):
                together = seeds[start : start + _CANDIDATES_AT_ONCE]

                def tell(done: int, start: int = start, count: int = len(together)) -> None:
                    clock.tell("compose", (start + count * done / len(vocal_codes)) / len(seeds))

                manner = styles[start : start + len(together)]
                sheet = None
                if arrangement is not None:
                    sheet = torch.stack(list(map(arrangement.tell, manner, together)))
                candidates = self.bundle.lm.compose(
                    vocal_codes,
                    seeds=together,
                    sampling=sampling,
                    prefix=given,
                    sheet=sheet,
                    again=arrangement and arrangement.again,
                    progress=tell,
                    follow=None if start else follow,
                )
                found = self._judge(sung, together, candidates, find_beats(plan))
                for number, (composition, style) in enumerate(zip(found, manner, strict=True)):
                    shown = None if sheet is None else sheet[number]
                    compositions.append(replace(composition, style=style, sheet=shown))
            order = rank([each.fit for each in compositions], styles, request.variations)
        return Sketches(
            ranked=[compositions[number] for number in order],
            request=request,
            settings=settings,
            vocal=vocal,
            pitched=pitched,
            pitch_clock=pitch_clock,
            tuning=tuning,
            vocal_codes=vocal_codes,
            told=told,
            pitches=pitches,
            plan=plan,
            intro_seconds=intro / SAMPLE_RATE_HZ,
            arrangement=arrangement,
            prefix_frames=0 if given is None else given.shape[-1],
            separator=separator,
            players=players,
            clock=clock,
        )

    def _lead_in(self, vocal: Vocal, request: Request) -> tuple[Vocal, SheetWishes, int]:
        """The vocal with silence for an intro before it, what is wished of it, the samples of the intro."""
        wishes = request.wishes()
        if request.intro is None:
            return vocal, wishes, 0
        codes = self.bundle.tokens.encode(vocal.listened.to(self.device), "vocal")[0].cpu()
        pitches, rate_hz = sung_pitch(vocal.wave), self.bundle.tokens.frame_rate_hz
        plan = make_plan(self.bundle.lm, codes, pitches, rate_hz, wishes)
        if plan is None:
            raise ConfigError("this model plays from no lead sheet and counts no bars; leave out --intro")
        begins, wishes = begin_band(plan, pitches, request.intro, wishes)
        samples = max(0, round(-begins * SAMPLE_RATE_HZ))
        return replace(vocal, wave=functional.pad(vocal.wave, (samples, 0))), wishes, samples

    def _open_separator(self, request: Request) -> Separator | None:
        """The separator that a request needs; one that is missing is told before anything is made."""
        if request.mix is None and not request.stems:
            return None
        # The mask head is part of the model; the other separators bring their own weights.
        checkpoint = str(self.bundle.folder) if request.separator == OWN_SEPARATOR else None
        if request.separator_checkpoint is not None:
            checkpoint = str(request.separator_checkpoint)
        return open_separator(request.separator, checkpoint, str(self.device))

    def _judge(
        self, sung: TrackReading, seeds: Sequence[int], candidates: Candidates, beats_seconds: np.ndarray
    ) -> list[Composition]:
        """What the candidates' codes say and how that fits what is sung."""
        nats = {name: getattr(candidates, name) for name in ("likelihood_nats", "information_nats")}
        compositions = []
        for number, (seed, codes) in enumerate(zip(seeds, candidates.codes, strict=True)):
            told = self._read_out(codes, "accompaniment")
            found = {name: float(values[number]) for name, values in nats.items() if values is not None}
            pulse = measure_pulse(told.mel[0], beats_seconds)
            fit = measure_fit(sung, read_track(told, "accompaniment"), pulse_bits=pulse, **found)
            compositions.append(Composition(seed=seed, codes=codes, told=told, fit=fit))
        return compositions

    def _encode_prefix(self, prefix: Any) -> Tensor:
        """Codes [k] of the given start [2, samples]; only whole frames count."""
        hop = self.bundle.tokens.hop_samples
        whole = prefix.shape[-1] // hop * hop
        if whole == 0:
            raise AudioError(f"the prefix has only {prefix.shape[-1]} samples; give at least {hop} (0.04 s)")
        wave = prefix[None, :, :whole].to(self.device)
        return self.bundle.tokens.encode(wave, "accompaniment")[0].cpu()

    def _read_out(self, codes: Tensor, track: str, wave: Tensor | None = None) -> ReadOut:
        """What codes, or the wave [1, channels, samples] of codes that say too little, tell."""
        told = None
        if wave is not None and track not in self.bundle.tokens.READABLE:
            told = self.bundle.tokens.targets(wave.to(self.device))
        told = told or self.bundle.tokens.read_out(codes[None].to(self.device), track)
        return ReadOut(mel=told.mel.cpu(), chroma=told.chroma.cpu())

    def perform(self, sketches: Sketches | Repainting, composition: Composition) -> Accompaniment:
        """Render a composition, set the level, listen to the result."""
        if isinstance(sketches, Repainting):
            return self._perform_stretch(sketches, composition)
        tokenizer, renderer = self.bundle.tokens, self.bundle.sound
        vocal, settings, clock = sketches.vocal, sketches.settings, sketches.clock
        codes, pitched, pitch_clock = composition.codes, sketches.pitched, sketches.pitch_clock
        samples, rate_hz = pitched.wave.shape[-1], tokenizer.frame_rate_hz
        with clock.stage("paint"):
            features = tokenizer.features(codes[None].to(self.device), "accompaniment")[0]
            latents = renderer.render_latents(
                features,
                steps=settings.steps,
                guidance=settings.render_guidance,
                seed=composition.seed,
                chart=self.bundle.chart(composition.sheet),
                progress=clock.counter("paint", codes.shape[-1]),
            )
        with clock.stage("sound"):
            wave = renderer.decode(latents, samples, clock.counter("sound", latents.shape[-1])).cpu().float()
        if wave.shape != pitched.wave.shape or not math.isfinite(peak(wave)):
            raise ConfigError("the model made no usable sound; choose milder settings or another --device")
        with clock.stage("mix"):
            wave = keep_rests(wave, sketches.plan and sketches.plan.sheet, rate_hz)
            band = wave if pitch_clock is None else pitch_clock.bring_back(wave, vocal.wave.shape[-1])
            level_db, fade_seconds = find_level(sketches.request, settings, sketches.arrangement)
            prefix, joined_gain = sketches.request.prefix, 1.0
            if isinstance(prefix, Tensor):
                joined_gain = join_prefix(prefix, band)
            mixdown = mix_down(vocal.wave, band, accompaniment_db=level_db, fade_seconds=fade_seconds)
            music = describe_music(
                vocal=pitched.wave,
                mixdown=mixdown if pitch_clock is None else replace(mixdown, accompaniment=wave),
                read_outs={"vocal": sketches.told, "accompaniment": composition.told},
                pitches=sketches.pitches,
                plan=sketches.plan,
            )
            music["band"] = describe_band(
                sketches.request, sketches.plan, composition.style, composition.sheet
            )
            if pitch_clock is not None:
                music = bring_back(music, pitch_clock) | describe_length(vocal.wave)
            music["band"]["intro_seconds"] = round(sketches.intro_seconds, 3)
            stems: Mapping[str, Tensor] = {}
            if sketches.request.stems and sketches.separator is not None:
                stems = _split(mixdown.accompaniment, sketches.separator)
        exports, players, played = sketches.request.export, sketches.players, dict[str, Tensor]()
        score, melody = self._read_score(
            features if "midi" in exports or players is not None else None,
            sketches.pitches if exports else None,
            pitch_clock,
        )
        report = {
            "vocal": vocal.name,
            "recording": describe_recording(sketches.request.song.wave),
            **music,
            "tuning": dict(sketches.tuning),
            "ranking": composition.fit.describe(),
            "seed": composition.seed,
            "settings": asdict(settings),
            "prefix_seconds": round(sketches.prefix_frames / rate_hz, 3),
            "model": {"name": self.bundle.name, "fingerprint": self.bundle.fingerprint},
            "device": str(self.device),
            "computing_seconds": {stage: round(clock.seconds[stage], 3) for stage in STAGES},
            "warnings": [*vocal.warnings, *warn_of_level(mixdown, sketches.request.accompaniment_db)],
        }
        if players is not None:
            outline = Outline.of_report(report)
            parts = cast_parts(place_on_grid(score, outline), outline.style)
            played = level_parts(players.play(parts, outline.seconds), mixdown.accompaniment_lufs)
        take = Take(
            codes=codes,
            vocal_codes=sketches.vocal_codes,
            sheet=composition.sheet,
            cents=None if pitch_clock is None else pitch_clock.cents,
            samples=samples,
            band_gain=joined_gain * mixdown.gain,
            own_gain=mixdown.own_gain,
            mix_gain=10 ** (mixdown.mix_gain_db / 20),
            fade_seconds=find_fade(fade_seconds),
            frame_rate_hz=rate_hz,
            tokenizer_fingerprint=str(tokenizer.fingerprint),
        )
        return Accompaniment(
            accompaniment=mixdown.accompaniment,
            mix=mixdown.mix,
            take=take,
            report=report,
            stems=stems,
            played=played,
            separated_vocal=None if sketches.request.mix is None else vocal.wave,
            format=sketches.request.format or "wav",
            exports=exports,
            notes=score,
            melody=melody,
        )

    def _compose_stretch(
        self, request: Request, settings: GenerationSettings, separator: Separator | None, clock: StageClock
    ) -> Repainting:
        """Compose the candidates of a stretch and rank them, `compose` of a repaint."""
        with clock.stage("listen"):
            stretch = begin_stretch(request, self.bundle, settings)
        compositions: list[Composition] = []
        seeds, sampling = _count_seeds(request, settings), _choose_sampling(settings)
        with clock.stage("compose"):
            for start in range(0, len(seeds), _CANDIDATES_AT_ONCE):
                together = seeds[start : start + _CANDIDATES_AT_ONCE]

                def tell(share: float, start: int = start, count: int = len(together)) -> None:
                    clock.tell("compose", (start + count * share) / len(seeds))

                compositions += compose_stretch(
                    stretch, self.bundle, self._read_out, together, sampling, tell
                )
            order = rank([each.fit for each in compositions])
        ranked = [compositions[number] for number in order]
        return replace(stretch, ranked=ranked, separator=separator, stages=clock)

    def _perform_stretch(self, stretch: Repainting, composition: Composition) -> Accompaniment:
        """Render a stretch and put it into the song, `perform` of a repaint."""
        clock, request, original = stretch.stages, stretch.request, stretch.original
        assert clock is not None
        with clock.stage("paint"):
            count = clock.counter("paint", len(composition.codes))
            painted = paint_stretch(stretch, composition, self.bundle, self.device, count)
        with clock.stage("sound"):
            count = clock.counter("sound", painted[0].shape[-1])
            wave, begin = sound_stretch(stretch, composition, self.bundle, painted, count)
        with clock.stage("mix"):
            accompaniment, mix = join_stretch(stretch, wave, begin)
            report = describe_stretch(stretch, composition, wave, begin)
            lufs = rounded(measure_loudness(accompaniment), 2)
            report["levels"] = {**report["levels"], "accompaniment_lufs": lufs}
            stems: Mapping[str, Tensor] = {}
            if request.stems and stretch.separator is not None:
                stems = _split(accompaniment, stretch.separator)
        report |= {
            "settings": {
                **asdict(stretch.settings),
                "accompaniment_db": report["settings"]["accompaniment_db"],
            },
            "device": str(self.device),
            "computing_seconds": {stage: round(clock.seconds[stage], 3) for stage in STAGES},
            "warnings": list(stretch.warnings),
        }
        features, pitches = None, None
        if "midi" in request.export:
            codes = composition.codes[None].to(self.device)
            features = self.bundle.tokenizer.features(codes, "accompaniment")[0]
        if request.export:
            sung = stretch.vocal if stretch.clock is None else stretch.clock.bring_to_pitch(stretch.vocal)
            pitches = sung_pitch(sung)
        score, melody = self._read_score(features, pitches, stretch.clock)
        return Accompaniment(
            accompaniment=accompaniment,
            mix=mix,
            take=replace(original.take, codes=composition.codes, sheet=composition.sheet),
            report=report,
            stems=stems,
            separated_vocal=original.separated_vocal,
            format=original.format,
            exports=request.export,
            notes=score,
            melody=melody,
        )

    def _read_score(
        self, features: Tensor | None, pitches: np.ndarray | None, clock: PitchClock | None
    ) -> tuple[Score, Sequence[Note]]:
        """What is played, by the codes' features, and sung, by its pitches, on the time line of the singer.

        None: not asked for.
        """
        score, melody = {}, list[Note]()
        if features is not None and self.bundle.score_reader is not None:
            score = dict(self.bundle.score_reader.read(features))
        if pitches is not None:
            melody = find_sung_notes(pitches)
        if clock is not None:
            score = {stem: bring_notes_back(notes, clock) for stem, notes in score.items()}
            melody = bring_notes_back(melody, clock)
        return score, melody


def _count_seeds(request: Request, settings: GenerationSettings) -> range:
    first = request.seed or 0
    return range(first, first + max(settings.candidates, request.variations))


def _choose_sampling(settings: GenerationSettings) -> SamplingConfig:
    names = ("guidance", "playing_guidance", "temperature", "top_k", "top_p")
    return SamplingConfig(**{name: getattr(settings, name) for name in names})


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


def find_players(font: str | Path | None) -> tuple[Players | None, list[str]]:
    """What plays a score, as Request.play has it, and what to say where no font is installed."""
    if font is None:
        return None, []
    try:
        return Players(None if font == INSTALLED else font), []
    except DataError as error:
        if font != INSTALLED:
            raise
        return None, [f"the score is not played: {error}"]


def _find_vocal(request: Request, separator: Separator | None) -> Vocal:
    """The vocal of a request that has been read, taken out of its mix where it has one."""
    song = request.song
    if request.mix is None or separator is None:
        return song
    vocal = check_vocal(separator.separate(song.wave)["vocal"], song.name, what="separated vocal")
    told = f"the vocal was separated from {song.name or 'the song'} by {separator.name}"
    warnings = (*song.warnings, f"{told}; a clean vocal fits better", *vocal.warnings)
    return replace(vocal, warnings=warnings)


def _split(accompaniment: Tensor, separator: Separator) -> dict[str, Tensor]:
    """Drums, bass and the rest of an accompaniment [2, samples], which sum to it.

    Nobody sings in it: what the separator takes for a voice belongs to the rest.
    """
    parts = separator.separate(accompaniment)
    return {"drums": parts["drums"], "bass": parts["bass"], "other": parts["other"] + parts["vocal"]}
