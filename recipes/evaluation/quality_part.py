"""How good the renderer sounds: the VAE alone, the round trip through tokens, and what is generated.

Beside the original of each test excerpt stand what the model makes of it and four references (the original
itself, another song, noise, silence), so that the scale of every measure can be read off the same table.
The folder `settings.folder` gets quality.md, quality.json and quality.png, and keeps what was measured on
each excerpt, so that the same command goes on where it was stopped.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.bundle import read_bundle_description
from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.audio_metrics import compare_spectra, mel_distance
from duotok.recipes.evaluation.coherence import pair_with_others
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_test_items
from duotok.recipes.evaluation.frechet import Anchors, frechet_distance, matched_distance, measure_anchors
from duotok.recipes.evaluation.intervals import mean_and_margin
from duotok.recipes.evaluation.kept_measures import Heard, KeptMeasures
from duotok.recipes.evaluation.music_features import INSTALL, MusicFeatures, has_music_features
from duotok.recipes.evaluation.quality_result import Quality, Value
from duotok.recipes.evaluation.quality_sounds import SOUNDS, SoundMaker, level_sounds
from duotok.recipes.evaluation.settings import Settings
from duotok.recipes.evaluation.sound import loudness_difference_lu, stereo_width_db
from duotok.recipes.evaluation.voice_metrics import PACKAGES, find_voice_metrics
from duotok.tokenizer.model import TRACKS

_ITEMS, _SECONDS = 24, 12.0
_VERSION = 1  # of the measures; kept ones of another version are made again


def measure_quality(settings: Settings) -> dict[str, float]:
    """Figures TRACK_SOUND_MEASURE of SOUNDS, and the Frechet distances between originals (frechet_...)."""
    quality = judge_quality(settings)
    if settings.folder is not None:
        from duotok.recipes.evaluation.quality_plot import draw_quality
        from duotok.recipes.evaluation.quality_table import write_quality

        write_quality(quality, settings.folder)
        draw_quality(quality, settings.folder / "quality.png")
        print(f"{settings.folder}: quality.md, quality.json, quality.png")
    return quality.figures()


def judge_quality(settings: Settings) -> Quality:
    """Measure all sounds of all excerpts."""
    items = read_test_items(settings.corpus)
    excerpts = choose_excerpts(
        items, count=settings.items or _ITEMS, seconds=settings.seconds or _SECONDS, seed=settings.seed
    )
    partners = pair_with_others([excerpt.item.song for excerpt in excerpts])
    listener = Listener()
    maker = SoundMaker(settings.bundle, settings.seed)
    songs = {
        "version": _VERSION,
        "corpus": sha256((settings.corpus / "test.jsonl").read_bytes()).hexdigest(),
    }
    kept = KeptMeasures(
        settings.folder,
        {
            **songs,
            "bundle": read_bundle_description(settings.bundle)["files"],
            "defaults": read_bundle_description(settings.bundle).get("defaults"),
            "seconds": excerpts[0].seconds,
            "seed": settings.seed,
            "measures": listener.measures,
        },
    )
    heard: dict[str, list[dict[str, Heard]]] = {track: [] for track in TRACKS}
    for track in TRACKS:
        for index, excerpt in enumerate(tqdm(excerpts, desc=f"quality: {track}", disable=None)):
            other = excerpts[partners[index]]
            name = f"{track} {excerpt.item.id} {excerpt.start_seconds:g} {other.item.id}"
            found = kept.read(name)
            if found is None:
                found = listener.listen(maker.make(excerpt, other, track), track)
                kept.keep(name, found)
            heard[track].append(found)
    anchors = None
    if listener.music is not None:
        originals = listener.listen_to_originals(items, KeptMeasures(settings.folder, songs))
        anchors = measure_anchors(
            originals,
            {item.id: item.style for item in items},
            most_patches=sum(len(_features(found)["original"]) for found in heard["accompaniment"]),
            seed=settings.seed,
        )
    left_out = list(listener.left_out)
    if anchors is None and listener.music is not None:
        left_out.append("Frechet anchors: there must be two styles with four test songs each")
    left_out += [
        f"round trip of the {track}: this bundle has no decoder of it"
        for track in TRACKS
        if track not in maker.rendered_tracks
    ]
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    return Quality(
        values={track: _summarize(heard[track], anchors, settings.seed) for track in TRACKS},
        anchors=anchors,
        excerpts=len(excerpts),
        seconds=excerpts[0].seconds,
        left_out=tuple(left_out),
    )


class Listener:
    """Measures sounds with all packages that are installed."""

    def __init__(self) -> None:
        self._voice = find_voice_metrics()
        self.music = MusicFeatures.from_package() if has_music_features() else None

    @property
    def measures(self) -> list[str]:
        """What depends on optional packages and can be measured."""
        return [*self._voice, *(["frechet"] if self.music is not None else [])]

    @property
    def left_out(self) -> list[str]:
        """What cannot be measured, and how to change that."""
        missing = [
            f"{name.upper()}: pip install {package}"
            for name, package in PACKAGES.items()
            if name not in self._voice
        ]
        return missing + ([] if self.music is not None else [f"Frechet distances: {INSTALL}"])

    def listen(self, sounds: Mapping[str, Tensor], track: str) -> dict[str, Heard]:
        """Compare each sound [2, samples] with "original" among them."""
        original, levelled = sounds["original"], level_sounds(sounds)
        width_db = stereo_width_db(original)
        found = {}
        for name, wave in levelled.items():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Trying to estimate tuning from empty")  # silence has none
                figures = compare_spectra(original, wave)
            figures["mel_distance"] = mel_distance(original, wave)
            figures["stereo_width_error_db"] = abs(stereo_width_db(wave) - width_db)
            figures["level_error_lu"] = abs(loudness_difference_lu(sounds[name], original))
            if track == "vocal":
                figures |= {measure: compare(original, wave) for measure, compare in self._voice.items()}
            features = None if self.music is None else self.music.of_wave(wave)
            found[name] = Heard(figures=figures, features=features)
        return found

    def listen_to_originals(self, items: Sequence[Item], kept: KeptMeasures) -> dict[str, np.ndarray]:
        """Features [patches, 200] of the whole accompaniments of items, by their ids."""
        assert self.music is not None
        features = {}
        for item in tqdm(items, desc="quality: anchors", disable=None):
            name = f"whole accompaniment {item.id}"
            found = kept.read(name)
            if found is None:
                heard = Heard(features=self.music.of_wave(item.read("accompaniment")))
                found = {"original": heard}
                kept.keep(name, found)
            features[item.id] = _features(found)["original"]
        return features


def _features(found: Mapping[str, Heard]) -> dict[str, np.ndarray]:
    return {
        sound: heard.features.double().numpy() for sound, heard in found.items() if heard.features is not None
    }


def _summarize(
    heard: Sequence[Mapping[str, Heard]], anchors: Anchors | None, seed: int
) -> dict[str, dict[str, Value]]:
    """Means over the excerpts of a track, and the Frechet distances of each sound from the originals."""
    summary: dict[str, dict[str, Value]] = {}
    for sound in SOUNDS:
        if sound not in heard[0]:
            continue
        summary[sound] = {}
        for measure in heard[0][sound].figures:
            values = [value for found in heard if not np.isnan(value := found[sound].figures[measure])]
            if values:
                mean, margin = mean_and_margin(values)
                summary[sound][measure] = Value(mean=mean, margin=margin, count=len(values))
        if sound == "shuffled" or heard[0][sound].features is None:
            continue  # the other songs are the same set of songs: only anchors tell what a distance means
        originals, found = (
            np.concatenate([_features(each)[name] for each in heard]) for name in ("original", sound)
        )
        patches = min(len(originals), anchors.patches if anchors is not None else len(originals))
        distances = {
            "frechet": matched_distance(originals, found, patches=patches, seed=seed),
            "frechet_all": frechet_distance(originals, found),
        }
        for name, distance in distances.items():
            summary[sound][name] = Value(mean=distance, margin=float("nan"), count=len(originals))
    return summary
