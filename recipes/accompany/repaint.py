"""A stretch of a result composed anew, between what stands left and right of it.

Run: generate --vocal song.wav --repaint 32.0-48.0 --from song-accompaniment [--out folder]

The codes before the stretch are its prefix; of several candidates that one is taken after which the codes
that follow are likely. The renderer holds the latents and the phases of the sound on both sides, and paints
what is between; outside of the stretch and a short cross-fade before it the samples stay as they are.
Only a window about the stretch is composed and rendered, however long the song is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from duotok.lm.contract import SamplingConfig
from duotok.lm.sheet.columns import STYLE
from duotok.lm.sheet.playing import STEM_COLUMNS
from duotok.recipes.accompany.arrangement import describe_levels
from duotok.recipes.accompany.bundle import Bundle
from duotok.recipes.accompany.mix import PEAK_LIMIT, fall
from duotok.recipes.accompany.original import Original
from duotok.recipes.accompany.rank import Composition, measure_fit, measure_pulse, read_track
from duotok.recipes.accompany.request import GenerationSettings, Request
from duotok.recipes.accompany.stages import StageClock
from duotok.recipes.accompany.tune import bring_to_pitch
from duotok.recipes.accompany.wishes import keep_rests, name_chords, write_chords
from duotok.recipes.separation.stems import Separator
from duotok.renderer.renderer import LATENT_RATE_HZ
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.long_waves import map_blocks
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.chroma import (
    CHROMA_RATE_HZ,
    active_segments,
    at_chroma_rate,
    correlate_chroma,
    estimate_activity,
    measure_chroma,
)
from duotok.tokenizer.music.harmony import estimate_chords
from duotok.tokenizer.music.labels import count_fifths, key_of
from duotok.tokenizer.music.pitch import measure_coherence, sung_pitch
from duotok.tokenizer.music.tuning import PitchClock

FADE_SECONDS = 0.05  # before each joint, so that what begins at it is heard whole
_WINDOW_FRAMES = 750  # of the language model
_LEAST_PAST_FRAMES = 250  # that it goes on from
_AHEAD_FRAMES = 75  # of the singer that it hears behind the stretch
_JOINT_FRAMES = 50  # standing codes behind it that a candidate is judged by
_CONTEXT_FRAMES = 75  # to each side, that the renderer holds
_HELD_FRAMES = 24  # to each side, whose sound's phases are held
_MARGIN_FRAMES = 5  # beyond, where an encoder sees the edge of its window
_BLURRED_LATENTS = 2  # behind the stretch, whose windows reach into it
_FEATURE_FRAMES = 250  # as far as the features of codes may depend on others
_LIMITER_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Repainting:
    """Candidates for a stretch, ranked, and what rendering one needs to know."""

    ranked: Sequence[Composition]  # best first; their codes and sheets are those of the whole song
    request: Request  # with its files read
    settings: GenerationSettings
    original: Original
    vocal: Tensor  # [2, samples] as it is in the mix
    clock: PitchClock | None
    warnings: Sequence[str]
    first: int  # frames of the stretch
    last: int
    low: int  # of the window that was composed in
    high: int
    seconds: tuple[float, float]  # of the stretch, as the frames are
    separator: Separator | None = None  # where stems are asked for
    stages: StageClock | None = None

    @property
    def rate_hz(self) -> float:
        """Frames per second."""
        return self.original.take.frame_rate_hz

    def place(self, seconds: float) -> float:
        """Where a moment at pitch is in the song, in seconds."""
        return seconds if self.clock is None else float(self.clock.to_song(seconds))

    @property
    def beats_seconds(self) -> np.ndarray:
        """The beats of the original's plan in the window, in seconds at pitch from where that begins."""
        beats = self.original.beats_seconds
        if self.clock is not None and len(beats):
            beats = self.clock.to_pitched(beats)
        frames = beats * self.rate_hz
        return beats[(frames >= self.low) & (frames < self.high)] - self.low / self.rate_hz


def begin_stretch(request: Request, bundle: Bundle, settings: GenerationSettings) -> Repainting:
    """The stretch of a request that has been read, nothing composed yet; ConfigError if it cannot be."""
    original, stretch = request.original, request.repaint
    assert isinstance(original, Original) and isinstance(stretch, tuple)
    original.require_wish(stretch, None, bundle.fingerprint)
    take = original.take
    frames, rate_hz, clock = len(take.codes), take.frame_rate_hz, take.clock(original.samples)
    times = np.array(stretch) if clock is None else clock.to_pitched(np.array(stretch))
    first, last = (min(round(float(time) * rate_hz), frames) for time in times)
    song = request.song.wave if original.separated_vocal is None else original.separated_vocal
    vocal = functional.pad(song, (original.samples - song.shape[-1], 0))
    past = max(_LEAST_PAST_FRAMES, _WINDOW_FRAMES - _AHEAD_FRAMES - (last - first))
    found = Repainting(
        ranked=(),
        request=request,
        settings=settings,
        original=original,
        vocal=vocal,
        clock=clock,
        warnings=[*original.report.get("warnings", ())],
        first=first,
        last=last,
        low=max(0, first - past),
        high=min(frames, last + _AHEAD_FRAMES),
        seconds=(0.0, 0.0),
    )
    ends = (found.place(first / rate_hz), min(found.place(last / rate_hz), original.samples / SAMPLE_RATE_HZ))
    warnings = [*found.warnings, *(line for line in request.wishes().warnings if line not in found.warnings)]
    return replace(found, seconds=ends, warnings=warnings)


def tell_stretch(stretch: Repainting, bundle: Bundle) -> Tensor | None:
    """The sheet [frames, COLUMNS] of the whole song with what is wished for the stretch; ConfigError."""
    request, take, band = stretch.request, stretch.original.take, bundle.lm.band
    if take.sheet is None:
        if request.chords is not None or request.style is not None or request.without:
            raise ConfigError("this model plays from no lead sheet; leave out --chords, --style, --without")
        return None
    sheet, wishes = take.sheet.clone(), request.wishes()
    if stretch.clock is not None:
        wishes = bring_to_pitch(wishes, stretch.clock)
    first, last, rate_hz = stretch.first, stretch.last, stretch.rate_hz
    if wishes.chart is not None:
        inside = [row for row in wishes.chart if row[0] * rate_hz < last and row[1] * rate_hz > first]
        if not inside:
            start, end = stretch.seconds
            raise ConfigError(
                f"no chord of the chart is in the stretch {start:.2f}-{end:.2f} s; give one there"
            )
        write_chords(sheet, inside, rate_hz, first, last)
    if request.style is not None and band is not None:
        sheet[first:last, STYLE] = band.styles.index(request.style)
    for stem in request.without:
        sheet[first:last, STEM_COLUMNS[stem]] = 0
    return sheet


def compose_stretch(
    stretch: Repainting,
    bundle: Bundle,
    read_out: Callable[[Tensor, str], ReadOut],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    tell: Callable[[float], None],
) -> list[Composition]:
    """A candidate for the stretch of each seed, all in one batch; tell is given the share that is done."""
    take, lm = stretch.original.take, bundle.lm
    first, last, low, high = stretch.first, stretch.last, stretch.low, stretch.high
    sheet = tell_stretch(stretch, bundle)
    candidates = lm.compose(
        take.vocal_codes[low:high],
        seeds=seeds,
        sampling=sampling,
        prefix=take.codes[low:first],
        sheet=None if sheet is None else sheet[low:high],
        stop=last - low,
        progress=lambda done: tell((done - (first - low)) / (last - first)),
    )
    songs = [
        torch.cat([take.codes[:first], row[first - low :], take.codes[last:]]) for row in candidates.codes
    ]
    nats = {name: getattr(candidates, name) for name in ("likelihood_nats", "information_nats")}
    nats["joint_nats"] = None
    end = min(len(take.codes), last + _JOINT_FRAMES)
    begin = max(low, end - _WINDOW_FRAMES)
    if end > last:
        nats["joint_nats"] = lm.judge(
            take.vocal_codes[begin:end],
            torch.stack([song[begin:end] for song in songs]),
            first=last - begin,
            sheet=None if sheet is None else sheet[begin:end],
        )
    sung = read_track(read_out(take.vocal_codes[low:high], "vocal"), "vocal")
    style = stretch.request.style or (stretch.original.report.get("band") or {}).get("style")
    compositions = []
    for number, (seed, codes) in enumerate(zip(seeds, songs, strict=True)):
        told = read_out(codes[low:high], "accompaniment")
        found = {name: float(values[number]) for name, values in nats.items() if values is not None}
        pulse = measure_pulse(told.mel[0], stretch.beats_seconds)
        fit = measure_fit(sung, read_track(told, "accompaniment"), pulse_bits=pulse, **found)
        compositions.append(Composition(seed=seed, codes=codes, told=told, fit=fit, style=style, sheet=sheet))
    return compositions


def paint_stretch(
    stretch: Repainting,
    composition: Composition,
    bundle: Bundle,
    device: torch.device,
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor, int]:
    """Return the latents about the stretch, the old band of the same time at pitch, and their first frame.

    The band is [2, samples] as it was rendered, before it was levelled.
    """
    take, settings = stretch.original.take, stretch.settings
    frames, hop = len(composition.codes), bundle.tokenizer.hop_samples
    first, last = stretch.first, stretch.last
    low, high = max(0, first - _CONTEXT_FRAMES), min(frames, last + _CONTEXT_FRAMES)
    far = max(0, low - _FEATURE_FRAMES)
    near_codes = composition.codes[far : high + _FEATURE_FRAMES].to(device)
    features = bundle.tokenizer.features(near_codes[None], "accompaniment")[0, low - far : high - far]
    outer = max(0, low - _MARGIN_FRAMES), min(frames, high + _MARGIN_FRAMES)
    band = _read_at_pitch(stretch, stretch.original.accompaniment, outer[0] * hop, outer[1] * hop)
    band = band / (take.band_gain or 1.0)
    old = bundle.renderer.vae.encode_song(band.to(device))
    per_frame = round(LATENT_RATE_HZ / stretch.rate_hz)
    old = old[:, (low - outer[0]) * per_frame :][:, : (high - low) * per_frame]
    before = old[:, : (first - low) * per_frame]
    after = old[:, (last - low) * per_frame + _BLURRED_LATENTS :]
    latents = bundle.renderer.render_latents(
        features,
        steps=settings.steps,
        guidance=settings.render_guidance,
        seed=composition.seed,
        chart=bundle.chart(None if composition.sheet is None else composition.sheet[low:high]),
        progress=progress,
        before=before if before.shape[1] else None,
        after=after if after.shape[1] else None,
    )
    return latents, band[:, (low - outer[0]) * hop :][:, : (high - low) * hop], low


def sound_stretch(
    stretch: Repainting,
    composition: Composition,
    bundle: Bundle,
    painted: tuple[Tensor, Tensor, int],
    progress: Callable[[int], None],
) -> tuple[Tensor, int]:
    """Return the band about the stretch at pitch [2, samples], before it is levelled, and its first frame."""
    latents, old, low = painted
    hop, per_frame = bundle.tokenizer.hop_samples, round(LATENT_RATE_HZ / stretch.rate_hz)
    first, last = stretch.first - low, stretch.last - low
    begin, end = max(0, first - _HELD_FRAMES), min(latents.shape[1] // per_frame, last + _HELD_FRAMES)
    wave = bundle.renderer.decode_between(
        latents[:, begin * per_frame : end * per_frame],
        old[:, begin * hop : first * hop],
        old[:, last * hop : end * hop],
        progress,
    )
    if not bool(wave.isfinite().all()):
        raise ConfigError("the model made no usable sound; choose milder settings or another --device")
    sheet = None if composition.sheet is None else composition.sheet[low + begin : low + end]
    return keep_rests(wave.cpu().float(), sheet, stretch.rate_hz), low + begin


def join_stretch(stretch: Repainting, painted: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """Return accompaniment and mix [2, samples] of the song with the stretch in it, by the original's gains.

    painted [2, n]: the band at pitch from frame `begin` on.
    """
    original, take = stretch.original, stretch.original.take
    samples, frames = original.samples, len(take.codes)
    left, right = (min(samples, round(time * SAMPLE_RATE_HZ)) for time in stretch.seconds)
    right = samples if stretch.last == frames else right
    fade = round(FADE_SECONDS * SAMPLE_RATE_HZ)
    start = max(0, left - fade)
    offset = begin / stretch.rate_hz
    if stretch.clock is None:
        new = painted[:, start - round(offset * SAMPLE_RATE_HZ) :][:, : right - start]
    else:
        new = stretch.clock.bring_back(painted, right - start, start / SAMPLE_RATE_HZ, offset)
    new = new * (take.band_gain / take.own_gain)
    tail = round(take.fade_seconds * SAMPLE_RATE_HZ)
    if (late := max(start, samples - tail)) < right:
        new[:, late - start :] *= fall(tail)[late - (samples - tail) :][: right - late]
    vocal = stretch.vocal[:, start:right]
    old = original.accompaniment[:, start:right] / take.own_gain
    joined = new.clone()
    lead = left - start
    joined[:, :lead] = _cross_fade(old[:, :lead], new[:, :lead], fall(lead))
    if stretch.last < frames:
        joined[:, -fade:] = _cross_fade(old[:, -fade:], new[:, -fade:], fall(fade).flip(0))
    joined = _limit(joined, vocal, PEAK_LIMIT / take.own_gain, PEAK_LIMIT / take.mix_gain)
    accompaniment, mix = (map_blocks(torch.clone, wave) for wave in (original.accompaniment, original.mix))
    accompaniment[:, start:right] = take.own_gain * joined
    mix[:, start:right] = take.mix_gain * (vocal + joined)
    return accompaniment, mix


def _cross_fade(old: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    """The sum of waves [2, n] by the share [n] that is kept of the old one, whether they are alike or not."""
    alike = (old * new).sum() / (old.norm() * new.norm()).clamp_min(1e-9)
    power = kept.square() + (1 - kept).square() + 2 * alike.clamp(0, 1) * kept * (1 - kept)
    return torch.lerp(new, old, kept) / power.sqrt()


def _limit(band: Tensor, vocal: Tensor, own_limit: float, mix_limit: float) -> Tensor:
    """The band [2, n], softer for a moment where it would exceed a peak by itself, or with the vocal."""
    from scipy.ndimage import minimum_filter1d, uniform_filter1d  # as few runs need it

    size = band.abs().clamp_min(1e-9)
    room = (mix_limit - vocal * band.sign()).clamp_min(0)
    gain = (torch.minimum(room, torch.tensor(own_limit)) / size).amin(dim=0).clamp(max=1).double().numpy()
    if gain.min() >= 1:
        return band
    width = round(_LIMITER_SECONDS * SAMPLE_RATE_HZ) | 1
    smooth = uniform_filter1d(minimum_filter1d(gain, width, mode="nearest"), width, mode="nearest")
    return band * torch.from_numpy(smooth).float()


def _read_at_pitch(stretch: Repainting, wave: Tensor, start: int, end: int) -> Tensor:
    """Samples start..end at pitch of a wave [2, samples] of the song; silence where it has ended."""
    if stretch.clock is not None:
        return stretch.clock.bring_to_pitch(wave, end - start, start / SAMPLE_RATE_HZ)
    part = wave[:, start:end]
    return functional.pad(part, (0, end - start - part.shape[-1]))


def describe_stretch(
    stretch: Repainting, composition: Composition, band: Tensor, begin: int
) -> dict[str, Any]:
    """Return the report of the original with what is another in the stretch.

    band [2, n]: what was rendered, at pitch from frame `begin` on. Its harmony with the singer is told of the
    stretch and what is next to it; what is heard in chords and activity, of the song.
    """
    report, rate_hz, low = dict(stretch.original.report), stretch.rate_hz, stretch.low
    chart_given = stretch.request.chords is not None
    for name in ("files", "made_by", "variations", "not_rendered", "stems", "rank", "accompaniment", "mix"):
        report.pop(name, None)
    start, end = stretch.seconds

    def put(
        rows: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]], shift: float = low / rate_hz
    ) -> list[Any]:
        """Rows of the song (start, end, ...) with those of the window, at pitch, inside of the stretch."""
        moved = ([*(stretch.place(time + shift) for time in row[:2]), *row[2:]] for row in new)
        pieces = [*_cut(rows, 0.0, start), *_cut(moved, start, end), *_cut(rows, end, np.inf)]
        return _merge(pieces)

    key = report.get("accompaniment_key") or report.get("vocal_key")
    fifths = 0 if key is None else count_fifths(key_of(key) % 12, ("maj", "min")[key_of(key) // 12])
    played = composition.told.chroma[0].double().numpy()
    active = estimate_activity(composition.told.mel[0])
    chords = estimate_chords(played, CHROMA_RATE_HZ, sounding=at_chroma_rate(active), fifths=fifths)
    report["chords"] = put(report["chords"], chords)
    segments = put(report["activity"]["accompaniment"]["segments_seconds"], active_segments(active))
    share = sum(last - first for first, last in segments) / report["seconds"]
    told = {"share": round(min(share, 1.0), 4), "segments_seconds": segments}
    report["activity"] = {**report["activity"], "accompaniment": told}
    if composition.sheet is not None:
        if chart_given and report.get("lead_sheet"):
            named = name_chords(composition.sheet, rate_hz, fifths)
            report["lead_sheet"] = {
                **report["lead_sheet"],
                "chords": put(report["lead_sheet"]["chords"], named, 0.0),
            }
        levels = put(report["band"]["levels"], describe_levels(composition.sheet, rate_hz), 0.0)
        report["band"] = {**report["band"], "levels": levels}
    vocal = _read_at_pitch(
        stretch, stretch.vocal, *(round(begin / rate_hz * SAMPLE_RATE_HZ) + n for n in (0, band.shape[-1]))
    )
    heard = measure_chroma(band)
    coherence = measure_coherence(heard, sung_pitch(vocal))
    skip = max(0, round((begin - low) / rate_hz * CHROMA_RATE_HZ))
    same = played[skip : skip + len(heard)]
    numbers = {name: getattr(coherence, name) for name in ("score", "harmony", "in_key")}
    numbers["tokens_to_sound_chroma_correlation"] = correlate_chroma(same, heard[: len(same)])
    report["coherence"] = {
        name: None if value is None else round(float(value), 4) for name, value in numbers.items()
    }
    report["ranking"] = composition.fit.describe()
    report.setdefault("original_seed", report["seed"])
    repaint = {
        "seconds": [round(start, 4), round(end, 4)],
        "from": Path(stretch.original.name).name,
        "seed": composition.seed,
        "style": composition.style,
        "without": list(stretch.request.without),
        "chords_given": chart_given,
        "ranking": report["ranking"],
    }
    report["repaints"] = [*report.get("repaints", ()), repaint]
    report["seed"] = composition.seed
    return report


def _cut(rows: Any, start: float, end: float) -> list[list[Any]]:
    """Of rows (start, end, ...) what is between two moments."""
    cut = ([max(row[0], start), min(row[1], end), *row[2:]] for row in rows)
    return [row for row in cut if row[1] > row[0]]


def _merge(rows: Sequence[list[Any]]) -> list[list[Any]]:
    """Rows (start, end, ...) in order, those that say the same and meet as one, rounded to milliseconds."""
    merged: list[list[Any]] = []
    for row in rows:
        row = [round(float(row[0]), 3), round(float(row[1]), 3), *row[2:]]
        if merged and merged[-1][2:] == row[2:] and row[0] - merged[-1][1] < 1e-3:
            merged[-1][1] = row[1]
        else:
            merged.append(row)
    return merged
