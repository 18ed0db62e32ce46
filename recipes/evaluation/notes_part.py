"""Whether the band's score is what is played: notes read from codes against those that the corpus knows.

Codes and notes are of items held out of the reader's training (`settings.tokens`, as lm.tokenize makes them,
and their manifest), and of songs that chose none of its thresholds. The sound of the score, by an installed
sound font, is compared with the band of excerpts of the corpus that it was read from, and with what the model
makes of their codes.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.bundle import Bundle, load_bundle
from duotok.recipes.accompany.export import cast_parts
from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.request import resolve_settings
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.evaluation.distances import MusicFeatures, frechet_distance
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.recipes.evaluation.renderer_part import rebuild_from_codes
from duotok.recipes.lm.tokens import TokenShards, check_tokens
from duotok.recipes.tokenizer.train_score_reader import measure, score_of, split_three_ways
from duotok.renderer.sound_font import Part, Players
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import read_json_mapping
from duotok.tokenizer.music.chroma import correlate_chroma, measure_chroma

_FONT_ITEMS, _FONT_SECONDS = 12, 20.0  # that the font plays


def measure_notes(settings: Settings) -> dict[str, float]:
    """F-measures of onsets within 50 ms by stem and of what sounds, and how the score sounds by a font."""
    if settings.tokens is None:
        raise ConfigError("notes needs --tokens: training tokens as duotok.recipes.lm.tokenize makes them")
    bundle = load_bundle(settings.bundle)
    reader, tokenizer = bundle.score_reader, bundle.tokenizer
    if reader is None:
        return {}
    config = read_json_mapping(settings.bundle / "score_reader" / "config.json", "bundle")
    shards = TokenShards(settings.tokens)
    check_tokens(shards, str(tokenizer.fingerprint))
    manifest = settings.manifest or settings.corpus / "train.jsonl"
    items = {item.id: item for item in read_manifest(manifest) if item.band}
    songs = [song for song in shards.index.songs if song.id in items]
    songs = split_three_ways(songs, config["extra"]["hold_out"])[2][: settings.items]
    if not songs:
        raise DataError(f"no item of {manifest} with the notes of a band was held out of the score reader")
    heard = []
    for song in tqdm(songs, unit="item", disable=not sys.stderr.isatty()):
        codes = shards.codes(song)["accompaniment"]
        heard.append(
            (reader.listen(tokenizer.features(codes[None], "accompaniment")[0]), score_of(items[song.id]))
        )
    figures = measure(heard, reader.thresholds.tolist(), reader.rate_hz)
    figures = {name.replace("/", "_"): value for name, value in figures.items()}
    with suppress(DataError):  # no font is installed
        figures |= _listen_to_font(settings, bundle, [items[song.id] for song in songs[:_FONT_ITEMS]])
    return {**figures, "items": len(songs)}


def _listen_to_font(settings: Settings, bundle: Bundle, items: Sequence[Item]) -> dict[str, float]:
    """The score of excerpts by a sound font, and the model's sound of them, beside the band that they are of.

    Chroma correlations of font and band; of the most that can be reached, which is what the font makes of the
    true notes of items, whose bands are by the same font; Frechet distances of what a music tagger hears.
    """
    players, music, reader = Players(), MusicFeatures.from_pretrained(), bundle.score_reader
    generation = resolve_settings(bundle.defaults, {})
    assert reader is not None

    def play(parts: Mapping[str, Part], like: Tensor) -> Tensor:
        sounds = players.play(parts, like.shape[-1] / SAMPLE_RATE_HZ)
        return torch.from_numpy(np.sum([*sounds.values(), 0 * like.numpy()], axis=0))

    def correlate(found: Tensor, band: Tensor) -> float:
        return correlate_chroma(measure_chroma(found), measure_chroma(band)) or 0.0

    correlations: dict[str, list[float]] = {"by_font": [], "of_true_notes": []}
    heard: dict[str, list[np.ndarray]] = {"band": [], "font": [], "rendered": []}
    excerpts = excerpts_of(settings, _FONT_ITEMS, _FONT_SECONDS)
    for number, excerpt in enumerate(tqdm(excerpts, unit="item", disable=not sys.stderr.isatty())):
        band = excerpt.read("accompaniment")
        features = bundle.tokenizer.features(
            bundle.tokenizer.encode(band[None], "accompaniment"), "accompaniment"
        )
        font = play(cast_parts(reader.read(features[0]), excerpt.item.style), band)
        correlations["by_font"].append(correlate(font, band))
        rendered = rebuild_from_codes(
            bundle.tokenizer, bundle.renderer, band, "accompaniment", generation, settings.seed + number
        )
        for name, wave in {"band": band, "font": font, "rendered": rendered}.items():
            heard[name].append(music.of_wave(match_level(wave, band)).double().numpy())
    silence = torch.zeros(2, round(_FONT_SECONDS * SAMPLE_RATE_HZ))
    for item in items:
        own = {}
        for program, is_drums, notes in (part for stem in item.band.values() for part in stem):
            inside = [tuple(note) for note in notes if note[0] < _FONT_SECONDS]
            own[str(len(own))] = Part(program=program, is_drums=is_drums, notes=inside)
        correlations["of_true_notes"].append(
            correlate(play(cast_parts(score_of(item), item.style), silence), play(own, silence))
        )
    whole = {name: np.concatenate(each) for name, each in heard.items()}
    return {
        **{f"chroma_correlation_{name}": float(np.mean(each)) for name, each in correlations.items()},
        **{f"frechet_{name}": frechet_distance(whole["band"], whole[name]) for name in ("font", "rendered")},
    }
