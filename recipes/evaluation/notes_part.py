"""Whether the band's score is what is played: notes read from codes against those that the corpus knows.

Codes and notes are of items held out of the reader's training (`settings.tokens`, as lm.tokenize makes them,
and their manifest), and of songs that chose none of its thresholds. The sound of the score, by an installed
sound font, is compared with the band of excerpts of the corpus that it was read from.
"""

import sys
from contextlib import suppress

import numpy as np
import torch
from tqdm import tqdm

from duotok.recipes.accompany.bundle import load_bundle
from duotok.recipes.accompany.export import cast_parts
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.recipes.lm.tokens import TokenShards, check_tokens
from duotok.recipes.tokenizer.train_score_reader import measure, score_of, split_three_ways
from duotok.renderer.sound_font import Players
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import read_json_mapping
from duotok.tokenizer.music.chroma import correlate_chroma, measure_chroma


def measure_notes(settings: Settings) -> dict[str, float]:
    """F-measures of onsets within 50 ms by stem and of what sounds, and the chroma correlation by a font."""
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
    bands = {item.id: score_of(item) for item in read_manifest(manifest) if item.band}
    songs = [song for song in shards.index.songs if song.id in bands]
    songs = split_three_ways(songs, config["extra"]["hold_out"])[2][: settings.items]
    if not songs:
        raise DataError(f"no item of {manifest} with the notes of a band was held out of the score reader")
    heard = []
    for song in tqdm(songs, unit="item", disable=not sys.stderr.isatty()):
        codes = shards.codes(song)["accompaniment"]
        heard.append((reader.listen(tokenizer.features(codes[None], "accompaniment")[0]), bands[song.id]))
    figures = measure(heard, reader.thresholds.tolist(), reader.rate_hz)
    figures = {name.replace("/", "_"): value for name, value in figures.items()}
    with suppress(DataError):  # no font is installed
        players = Players()
        found: list[float] = []
        for excerpt in tqdm(excerpts_of(settings, items=12), unit="item", disable=not sys.stderr.isatty()):
            wave = excerpt.read("accompaniment")
            features = tokenizer.features(tokenizer.encode(wave[None], "accompaniment"), "accompaniment")[0]
            sounds = players.play(cast_parts(reader.read(features), None), excerpt.seconds)
            played = torch.from_numpy(np.sum([*sounds.values(), 0 * wave.numpy()], axis=0))
            found.append(correlate_chroma(measure_chroma(played), measure_chroma(wave)) or 0.0)
        figures["chroma_correlation_by_font"] = float(np.mean(found))
    return {**figures, "items": len(songs)}
