"""How good the renderer sounds: the VAE alone, the round trip through tokens, and what is generated.

Beside the original of each test excerpt stand what the model makes of it and four references (the original
itself, another song, noise, silence), so that the scale of every measure can be read off the same table.
The folder `settings.folder` gets quality.md and quality.png.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.audio_metrics import (
    compare_spectra,
    find_voice_metrics,
    loudness_difference_lu,
    measure_playing,
    mel_distance,
    missing_voice_metrics,
    stereo_width_db,
)
from duotok.recipes.evaluation.distances import (
    Anchors,
    MusicFeatures,
    compare_codes,
    compare_sets,
    compare_styles,
    frechet_distance,
    matched_distance,
    measure_anchors,
)
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of, read_items
from duotok.recipes.evaluation.heard_coherence import pair_with_others
from duotok.recipes.evaluation.quality_report import SOUNDS, Quality, Value, draw_quality, render_quality
from duotok.recipes.evaluation.renderer_part import chart_excerpt, rebuild_by_vae, rebuild_from_codes
from duotok.recipes.evaluation.results import mean_and_margin
from duotok.tokenizer.common.files import write_text
from duotok.tokenizer.model import TRACKS

# Made at the level of the recording; codes do not know it, and another song has another one.
_KEEPS_LEVEL = ("vae", "original")


class SoundMaker:
    """Makes all sounds of an excerpt with one loaded bundle."""

    def __init__(self, bundle: Path, seed: int) -> None:
        self._accompanist = Accompanist.from_pretrained(bundle)
        self._seed = seed

    @property
    def rendered_tracks(self) -> tuple[str, ...]:
        """The tracks this bundle has decoders of; of others only the VAE alone can be heard."""
        return tuple(self._accompanist.bundle.renderer.decoders)

    def make(
        self, excerpt: Excerpt, other: Excerpt, track: str, number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sounds of a track of an excerpt, as they come out: {sound: [2, samples]} at 48 kHz.

        other: an excerpt of another song, as long as this one; number: of the excerpt, so that no two are
        drawn by the same chance. Also the codes [frames] of the original and the generated accompaniment.
        """
        wave, codes = excerpt.read(track), dict[str, Tensor]()
        parts = self._accompanist.bundle
        noise = np.random.default_rng((self._seed, number)).standard_normal(
            tuple(wave.shape), dtype=np.float32
        )
        sounds = {
            "vae": rebuild_by_vae(parts.renderer.vae, wave),
            "original": wave,
            "shuffled": other.read(track),
            "random": match_level(torch.from_numpy(noise), wave),
            "silent": torch.zeros_like(wave),
        }
        if track in self.rendered_tracks:
            sounds["round_trip"] = rebuild_from_codes(
                parts.tokenizer, parts.renderer, wave, track, self._accompanist.defaults, self._seed
            )
        if track == "accompaniment" and parts.renderer.styles:
            chart = chart_excerpt(excerpt, parts.renderer.styles)
            sounds["told_round_trip"] = rebuild_from_codes(
                parts.tokenizer, parts.renderer, wave, track, self._accompanist.defaults, self._seed, chart
            )
        if track == "accompaniment":
            made = self._accompanist.accompany(excerpt.read("vocal"), seed=self._seed + number)
            sounds["generated"] = made.accompaniment
            codes = {"original": parts.tokenizer.encode(wave[None], track)[0], "generated": made.codes}
        return {sound: sounds[sound] for sound in SOUNDS if sound in sounds}, codes


def level_sounds(sounds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sounds at the level of the original where they cannot know it (P B.3: loudness normalization)."""
    original = sounds["original"]
    return {
        sound: wave if sound in _KEEPS_LEVEL else match_level(wave, original)
        for sound, wave in sounds.items()
    }


def measure_quality(settings: Settings) -> dict[str, float]:
    """Figures TRACK_SOUND_MEASURE of SOUNDS, and the Frechet distances between originals (frechet_...)."""
    quality = judge_quality(settings)
    if settings.folder is not None:
        write_text(settings.folder / "quality.md", render_quality(quality))
        draw_quality(quality, settings.folder / "quality.png")
        print(f"{settings.folder}: quality.md, quality.png")
    return quality.figures()


def judge_quality(settings: Settings) -> Quality:
    """Measure all sounds of all excerpts."""
    items = read_items(settings)
    excerpts = excerpts_of(settings, 96, 10.0, per_item=2)
    partners = pair_with_others([excerpt.item.song for excerpt in excerpts])
    music = MusicFeatures.from_pretrained()
    maker = SoundMaker(settings.bundle, settings.seed)
    tracks = TRACKS if settings.track is None else (settings.track,)
    heard: dict[str, list[dict[str, Heard]]] = {track: [] for track in tracks}
    for track in tracks:
        for number, excerpt in enumerate(tqdm(excerpts, desc=f"quality: {track}", disable=None)):
            sounds, codes = maker.make(excerpt, excerpts[partners[number]], track, number)
            heard[track].append(listen(sounds, track, music, excerpt, codes))
    bands = {
        item.id: music.of_wave(item.read("accompaniment")).double().numpy()
        for item in tqdm(items, desc="quality: the corpus' own bands", disable=None)
    }
    styles = {item.id: item.style for item in items}
    anchors = measure_anchors(
        bands,
        styles,
        most_patches=sum(len(found["original"].features) for found in heard[tracks[-1]]),
        seed=settings.seed,
    )
    values = {track: _summarize(heard[track], anchors, settings.seed) for track in tracks}
    if "accompaniment" in tracks:
        for sound, found in judge_sets(heard["accompaniment"], bands, styles, settings.seed).items():
            values["accompaniment"].setdefault(sound, {}).update(found)
    left_out = [f"{name.upper()}: pip install {package}" for name, package in missing_voice_metrics().items()]
    if anchors is None:
        left_out.append("Frechet anchors: there must be two styles with four test songs each")
    missing = (track for track in tracks if track not in maker.rendered_tracks)
    left_out += [f"round trip of the {track}: this bundle has no decoder of it" for track in missing]
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    return Quality(
        values=values,
        anchors=anchors,
        excerpts=len(excerpts),
        seconds=excerpts[0].seconds,
        left_out=tuple(left_out),
    )


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What was measured on one sound."""

    figures: dict[str, float]  # NaN where something cannot be measured
    features: np.ndarray  # [patches, 200]
    codes: Tensor | None  # [frames], of what was encoded or composed


def listen(
    sounds: Mapping[str, Tensor],
    track: str,
    music: MusicFeatures,
    excerpt: Excerpt,
    codes: Mapping[str, Tensor],
) -> dict[str, Heard]:
    """Compare each sound [2, samples] with "original" among them, by all measures that are installed."""
    original, levelled = sounds["original"], level_sounds(sounds)
    width_db = stereo_width_db(original)
    voice = find_voice_metrics() if track == "vocal" else {}
    found = {}
    for name, wave in levelled.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Trying to estimate tuning from empty")  # silence has none
            figures = compare_spectra(original, wave)
        figures["mel_distance"] = mel_distance(original, wave)
        figures["stereo_width_error_db"] = abs(stereo_width_db(wave) - width_db)
        figures["level_error_lu"] = abs(loudness_difference_lu(sounds[name], original))
        figures |= {measure: compare(original, wave) for measure, compare in voice.items()}
        if track == "accompaniment":
            figures |= measure_playing(wave, excerpt.beats_seconds, excerpt.downbeats_seconds)
        features = music.of_wave(wave).double().numpy()
        found[name] = Heard(figures=figures, features=features, codes=codes.get(name))
    return found


def judge_sets(
    heard: Sequence[Mapping[str, Heard]],
    bands: Mapping[str, np.ndarray],
    styles: Mapping[str, str],
    seed: int,
) -> dict[str, dict[str, Value]]:
    """Each sound of the excerpts as a set, against the bands of the whole corpus {item: [patches, 200]}."""
    whole = np.concatenate(list(bands.values()))
    true = [each["original"] for each in heard]
    judged = {}
    for sound in heard[0]:
        songs = [each[sound] for each in heard]
        figures = compare_sets(whole, [s.features for s in true], [s.features for s in songs], seed=seed)
        if songs[0].codes is not None:
            pairs = [(a.codes, b.codes) for a, b in zip(true, songs, strict=True)]
            figures |= compare_codes(*zip(*pairs, strict=True))
        judged[sound] = figures
    patches = sum(len(song.features) for song in true)
    judged["other_style"] = compare_styles(bands, styles, patches=patches, seed=seed)
    return {
        sound: {name: Value(mean=value) for name, value in figures.items()}
        for sound, figures in judged.items()
        if figures
    }


def _summarize(
    heard: Sequence[Mapping[str, Heard]], anchors: Anchors | None, seed: int
) -> dict[str, dict[str, Value]]:
    """Means over the excerpts of a track, and the Frechet distances of each sound from the originals."""
    summary: dict[str, dict[str, Value]] = {}
    for sound in (name for name in SOUNDS if name in heard[0]):
        summary[sound] = {}
        for measure in heard[0][sound].figures:
            values = [value for found in heard if not np.isnan(value := found[sound].figures[measure])]
            if values:
                mean, margin = mean_and_margin(values)
                summary[sound][measure] = Value(mean=mean, margin=margin)
        originals, found = (
            np.concatenate([each[name].features for each in heard]) for name in ("original", sound)
        )
        patches = min(len(originals), anchors.patches if anchors is not None else len(originals))
        distances = {"frechet": matched_distance(originals, found, patches=patches, seed=seed)}
        if sound != "shuffled":  # all the other songs are the same set of songs
            distances["frechet_all"] = frechet_distance(originals, found)
        for name, distance in distances.items():
            summary[sound][name] = Value(mean=distance)
    return summary
