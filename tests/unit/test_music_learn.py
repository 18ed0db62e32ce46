"""The harmony reader's training: labels, batches, and a run of size tiny on a synthetic corpus."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.scores.song import Note, Song, Span
from duotok.recipes.lm import tokenize
from duotok.recipes.tokenizer import train_harmony_reader as learn
from duotok.recipes.tokenizer import train_melody_reader
from duotok.recipes.tokenizer.train_harmony_reader import (
    BlockSampler,
    ChromaSong,
    LabelledChromaConfig,
    make_up_chords,
)
from duotok.recipes.tokenizer.train_melody_reader import Beats
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.music.harmony import HarmonyReader, HarmonyReaderConfig
from duotok.tokenizer.music.labels import NO_CHORD, chords_of_blocks, key_of, name_note, triad_of
from duotok.tokenizer.music.melody import MelodyReaderConfig, default_melody_reader

TINY = Path(learn.__file__).parent / "train_harmony_reader" / "tiny.yaml"
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])


def make_song(tonic: int, rng: np.random.Generator) -> ChromaSong:
    """A song of one chord in a major key: its scale, the tonic strongest."""
    blocks = 0.1 * rng.uniform(size=(50, 12))
    blocks[:, (SCALE + tonic) % 12] += 0.4
    blocks[:, tonic] += 0.4
    chroma = torch.from_numpy(blocks).float()
    sounding = torch.ones(50, dtype=torch.bool)
    return ChromaSong(
        blocks={"vocal": chroma, "accompaniment": chroma},
        sounding={"vocal": sounding, "accompaniment": sounding},
        chords=torch.full((50,), tonic),
        key=tonic,
    )


@pytest.mark.parametrize(
    ("label", "chord"),
    [
        ("C:maj", 0),
        ("Bb:7", 10),
        ("F#:min7", 18),
        ("A:min", 21),
        ("N", NO_CHORD),
        ("C:sus4", -1),
        ("B:dim", -1),
    ],
)
def test_chords_count_by_their_triad(label, chord):
    assert triad_of(label) == chord


def test_keys_and_chords_as_classes():
    assert [key_of(label) for label in ("C:maj", "Eb:min", "B:maj")] == [0, 15, 11]
    chords = chords_of_blocks([(0.0, 0.3, "C:maj"), (0.3, 0.5, "A:min")], 7, 10.0)
    assert chords.tolist() == [0, 0, 0, 21, 21, -1, -1]


def test_made_up_chords_are_what_they_say():
    blocks, chords = make_up_chords(np.random.default_rng(3), 4_000)
    assert blocks.min() >= 0 and blocks.max() <= 1 and len(blocks) == len(chords) == 4_000
    assert set(chords.tolist()) == set(range(25))
    for chord in (2, 16):
        mean = blocks[chords == chord].mean(dim=0)
        root, third = chord % 12, 3 if chord >= 12 else 4
        wanted = {root, (root + third) % 12, (root + 7) % 12}
        assert set(mean.topk(3).indices.tolist()) == wanted


def test_a_batch_is_a_function_of_its_generator():
    sampler = BlockSampler([make_song(tonic, np.random.default_rng(tonic)) for tonic in (0, 5)])
    first, second, third = (sampler.draw(np.random.default_rng(seed), 64) for seed in (1, 1, 2))
    assert first["around"].shape == (64, 9, 12)
    assert torch.equal(first["around"], second["around"])
    assert not torch.equal(first["around"], third["around"])
    assert set(first["chords"][:56].tolist()) == {0, 5}


def test_keys_are_learned_in_one_and_known_in_all():
    rng = np.random.default_rng(0)
    reader = HarmonyReader(HarmonyReaderConfig(hidden_dim=4))
    learn.fit_keys(reader, [make_song(tonic, rng) for tonic in (0, 2, 7)])
    for track in ("vocal", "accompaniment"):
        for tonic in range(12):
            evidence = reader.key_evidence(make_song(tonic, rng).blocks[track], track)
            assert int(reader.key_logits(evidence[None], track).argmax()) == tonic


@pytest.mark.parametrize("broken", [{"items": 0}, {"heard_every": 0}])
def test_bad_settings_are_refused(broken):
    with pytest.raises(ConfigError):
        LabelledChromaConfig(manifest="", tokenizer="", tokens="", **broken)


def command(corpus: Path, tokenizer: Path, tokens: Path, out: Path) -> list[str]:
    data = {"manifest": corpus / "train.jsonl", "tokenizer": tokenizer, "tokens": tokens}
    settings = [part for name, path in data.items() for part in ("--set", f"data.{name}={path}")]
    return [str(TINY), "--out", str(out), *settings]


def test_the_recipe_learns_and_its_result_loads(tiny_corpus, tiny_components, tmp_path, capsys):
    tokenizer, tokens = tiny_components["tokenizer"], tmp_path / "tokens"
    manifest = str(tiny_corpus / "train.jsonl")
    assert tokenize.main(["--tokenizer", str(tokenizer), "--manifest", manifest, "--out", str(tokens)]) == 0
    assert learn.main(command(tiny_corpus, tokenizer, tokens, tmp_path / "run")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["total"] < 0.8 * rows[0]["total"]
    reader = HarmonyReader.from_pretrained(tmp_path / "run" / "final")
    assert reader.fingerprint is not None
    capsys.readouterr()
    assert learn.main(command(tiny_corpus, tokenizer, tmp_path / "nowhere", tmp_path / "other")) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def make_score(tonic: int) -> Song:
    """Thirty bars of two broken chords, I and V, after two upbeats, at 120 BPM."""
    chords = [(0, 4, 7, 4), (7, 11, 14, 11)]
    notes = tuple(
        Note(
            start=beat / 2,
            end=beat / 2 + 0.5,
            velocity=90,
            pitch=60 + tonic + chords[bar % 2][(beat - 2) % 4],
        )
        for beat, bar in ((beat, (beat - 2) // 4) for beat in range(122))
    )
    names = [f"{name_note((tonic + step) % 12)}:maj" for step in (0, 7)]
    bars = tuple(Span(start=1.0 + 2 * bar, end=3.0 + 2 * bar, label=names[bar % 2]) for bar in range(-1, 30))
    beats = tuple(beat / 2 for beat in range(123))
    keys = (Span(start=0.0, end=61.0, label=names[0]),)
    return Song(
        name="",
        melody=notes,
        piano=(),
        beats=beats,
        downbeats=tuple(range(2, 123, 4)),
        chords=bars,
        keys=keys,
    )


def test_scores_are_read_beat_by_beat():
    beats = Beats.of_song(make_score(9))
    assert beats.numbers[:6].tolist() == [2, 3, 0, 1, 2, 3] and set(beats.keys) == {9}
    assert beats.chords[:10].tolist() == [4] * 2 + [9] * 4 + [4] * 4
    assert (beats.sung[2, :, 9] == 1).all() and beats.sung.sum() == pytest.approx(122 * 8)
    twice, half = beats.counted(2.0), beats.counted(0.5, 1)
    assert (len(twice.sung), len(half.sung)) == (244, 60)
    assert twice.numbers[4:8].tolist() == [0, 1, 2, 3]
    assert (half.sung[0, :2, 8] == 1).all() and (half.sung[0, 2:, 9] == 1).all()  # an upbeat and a downbeat


def test_a_melody_reader_learns_and_hears_all_keys_alike():
    songs = [Beats.of_song(make_score(tonic)) for tonic in (0, 5)]
    config = MelodyReaderConfig(dim=8, dilations=(1, 2))
    reader = train_melody_reader.train([songs], config, steps=120, seed=0)
    assert train_melody_reader.measure(reader, songs)["chord"] > 0.7
    shipped = default_melody_reader()
    low, high = (song.counted(1.0) for song in songs)
    for keys in (low.keys, low.keys + 12):
        told = shipped.judge(low.sung, keys, 4, low.numbers)[0]
        moved = shipped.judge(high.sung, keys + 5, 4, high.numbers)[0]
        index = [(chord + 5) % 12 + chord // 12 * 12 for chord in range(NO_CHORD)]
        assert np.allclose(told, moved[:, index], atol=1e-5)
    assert (shipped.judge(low.sung, low.keys, 4, low.numbers)[0].argmax(axis=1) == low.chords).mean() > 0.5


def test_a_melody_reader_hears_bars_of_three_from_a_second_source():
    three = replace(make_score(0), beats_per_bar=3, downbeats=tuple(range(2, 123, 3)))
    sources = [[Beats.of_song(make_score(0))], [Beats.of_song(three)]]
    (_, numbers, meters, _), (*_, paces) = train_melody_reader.draw_batch(sources, np.random.default_rng(0))
    in_three = meters[:, 0] == 3
    assert 0 < in_three.sum() < len(meters)
    assert numbers[in_three].max() <= 2 and numbers[~in_three].max() == 3
    assert (paces[in_three] < 0).all() and (paces[~in_three, 0] >= 0).all()  # in three nobody counts double
    reader = train_melody_reader.train(sources, MelodyReaderConfig(dim=8, dilations=(1, 2)), steps=60, seed=0)
    assert train_melody_reader.measure(reader, sources[1])["chord"] > 0.4


def test_scores_without_a_melody_for_a_split_are_told_in_one_line(tmp_path, capsys):
    (tmp_path / "songs").mkdir()
    command = ["--songs", str(tmp_path / "songs"), "--out", str(tmp_path / "out")]
    assert train_melody_reader.main(command) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
