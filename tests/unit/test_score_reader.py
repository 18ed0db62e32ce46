"""The score reader: notes and what it learns of them are each other's inverse, and its figures are right."""

import json
from dataclasses import replace
from pathlib import Path

import mir_eval
import numpy as np
import pytest
import torch

from duotok.recipes.accompany.bundle import assemble_bundle
from duotok.recipes.corpus.manifest import read_manifest, write_manifest
from duotok.recipes.evaluation.excerpts import Settings
from duotok.recipes.evaluation.notes_part import measure_notes
from duotok.recipes.lm import tokenize
from duotok.recipes.tokenizer import train_score_reader as learn
from duotok.recipes.tokenizer.train_score_reader import (
    ScoreDataConfig,
    count_onsets,
    draw_targets,
    fit_thresholds,
    measure,
    score_of,
)
from duotok.renderer import sound_font
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.music import score_reader
from duotok.tokenizer.music.score_reader import Note, ScoreReader, ScoreReaderConfig, column_of, find_notes

TINY = Path(learn.__file__).parent / "train_score_reader" / "tiny.yaml"
RATE_HZ, STEPS = 50.0, 500


def draw_score(seed: int) -> dict[str, list[Note]]:
    """Ten seconds of notes at moments between the steps, none struck again within 0.2 s."""
    rng = np.random.default_rng(seed)
    score = {}
    for stem, pitches in (("drums", (36, 38, 42)), ("bass", (30, 43)), ("other", (60, 64, 67))):
        notes = []
        for pitch in pitches:
            for start in (np.arange(0.3, 9.4, 0.45) + rng.uniform(0, 0.2, size=21)).tolist():
                end = start + (0.1 if stem == "drums" else 0.2)
                notes.append(Note(start, end, pitch, int(rng.integers(1, 128))))
        score[stem] = sorted(notes)
    return score


def hear(score: dict[str, list[Note]]) -> dict[str, np.ndarray]:
    """What a perfect reader says of a score."""
    drawn = draw_targets(learn._as_arrays(score, RATE_HZ), 0, STEPS)
    names = {"onset": "onsets", "frame": "frames", "velocity": "velocities"}
    return {name: drawn[told].numpy() for name, told in names.items()}


def test_what_is_learned_of_notes_gives_them_back():
    score = draw_score(0)
    found = find_notes(hear(score), [0.5] * 4, RATE_HZ)
    for stem, notes in score.items():
        assert [note.pitch for note in found[stem]] == [note.pitch for note in notes]
        for read, true in zip(found[stem], notes, strict=True):
            assert read.start == pytest.approx(true.start, abs=1e-3)
            assert read.end == pytest.approx(true.end, abs=0.011)
            assert abs(read.velocity - true.velocity) <= 1


def test_a_window_is_a_cut_of_the_song():
    notes = learn._as_arrays(draw_score(1), RATE_HZ)
    whole, cut = draw_targets(notes, 0, STEPS), draw_targets(notes, 120, 200)
    for name, values in whole.items():
        assert torch.equal(values[120:320], cut[name])


def test_songs_of_any_length_are_read_in_one_way(monkeypatch):
    torch.manual_seed(0)
    reader = ScoreReader(ScoreReaderConfig(feature_dim=6, dim=8, dilations=(1, 2))).eval()
    features = torch.randn(50, 6)
    whole = reader.listen(features)
    monkeypatch.setattr(score_reader, "_CHUNK_FRAMES", 8)
    for name, values in reader.listen(features).items():
        assert len(values) == 100
        np.testing.assert_allclose(values, whole[name], atol=1e-6)


def test_small_directions_of_features_are_heard_as_large_ones():
    torch.manual_seed(0)
    features = 5 + torch.randn(500, 6) @ torch.diag(
        torch.tensor([4.0, 2.0, 1.0, 0.3, 0.1, 0.04])
    ) @ torch.randn(6, 6)
    reader = ScoreReader(ScoreReaderConfig(feature_dim=6, dim=8, dilations=(1,)))
    reader.fit_input(features)
    heard: list[torch.Tensor] = []
    reader.join.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        reader(features[None])
    assert torch.allclose(heard[0][0].float().T.cov(), torch.eye(6), atol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_mir_eval(seed):
    rng = np.random.default_rng(seed)
    true = draw_score(seed)
    read = {
        stem: [n._replace(start=n.start + rng.uniform(-0.09, 0.09)) for n in notes if rng.random() < 0.8]
        + [Note(start, start + 0.1, notes[0].pitch, 80) for start in rng.uniform(0, 9, size=9).tolist()]
        for stem, notes in true.items()
    }
    for stem in true:
        spans, pitches = zip(
            *(
                (
                    np.array([[note.start, note.start + 0.1] for note in notes]),
                    440 * 2 ** ((np.array([note.pitch for note in notes]) - 69) / 12),
                )
                for notes in (true[stem], read[stem])
            ),
            strict=True,
        )
        wanted = mir_eval.transcription.precision_recall_f1_overlap(
            spans[0], pitches[0], spans[1], pitches[1], offset_ratio=None
        )[2]
        hits, found, total = count_onsets(read[stem], true[stem])
        assert 2 * hits / (found + total) == pytest.approx(wanted) and 0.2 < wanted < 0.9


def test_thresholds_are_fitted():
    score = draw_score(2)
    told = {name: 0.45 * values for name, values in hear(score).items()}
    told["onset"] += 0.24 * np.roll(hear(draw_score(5))["onset"], 3, axis=1)  # what is not played
    thresholds = fit_thresholds([(told, score)], RATE_HZ)
    assert all(0.24 <= value <= 0.45 for value in thresholds[:3])
    figures = measure([(told, score)], thresholds, RATE_HZ)
    assert min(figures.values()) > 0.95 > measure([(told, score)], [0.2] * 4, RATE_HZ)["onset_f/drums"]


def test_what_is_struck_twice_at_once_is_struck_once(tiny_corpus):
    item = read_manifest(tiny_corpus / "train.jsonl")[0]
    pads, piano = [(1.0, 4.0, 60, 50)], [(1.01, 1.5, 60, 90), (2.0, 2.5, 60, 70), (1.0, 1.5, 12, 70)]
    drums = [(1.0, 1.1, 38, 80), (1.0, 1.1, 39, 80), (1.0, 1.1, 36, 80), (9.0, 9.1, 36, 80)]
    band = {"other": [(48, False, pads), (0, False, piano)], "drums": [(0, True, drums)]}
    score = score_of(replace(item, band=band))
    assert score["other"] == [Note(1.0, 4.0, 60, 90), Note(2.0, 2.5, 60, 70)]
    assert score["drums"] == [Note(1.0, 1.1, 36, 80), Note(1.0, 1.1, 38, 80)] and score["bass"] == []
    assert column_of("bass", 20) is None and column_of("drums", 81) == column_of("drums", 70)


@pytest.mark.parametrize("broken", [{"items": 0}, {"hold_out": 1.0}, {"seconds": 0.0}])
def test_bad_settings_are_refused(broken):
    with pytest.raises(ConfigError):
        ScoreDataConfig(manifest="", tokenizer="", tokens="", **broken)


def test_the_recipe_learns_and_its_result_reads(
    tiny_corpus, tiny_components, font, tmp_path, capsys, monkeypatch
):
    tokenizer, tokens = tiny_components["tokenizer"], tmp_path / "tokens"
    notes = [(start, start + 0.4, 48, 80) for start in np.arange(0, 8, 0.5).tolist()]
    band = {
        "drums": [(0, True, [(start, start + 0.1, 38, 90) for start, *_ in notes])],
        "bass": [(33, False, notes)],
    }
    items = read_manifest(tiny_corpus / "train.jsonl")
    write_manifest(tiny_corpus / "with_band.jsonl", [replace(item, band=band) for item in items])
    data = {"manifest": tiny_corpus / "with_band.jsonl", "tokenizer": tokenizer, "tokens": tokens}
    common = [part for name in ("tokenizer", "manifest") for part in (f"--{name}", str(data[name]))]
    assert tokenize.main([*common, "--out", str(tokens)]) == 0
    settings = [part for name, path in data.items() for part in ("--set", f"data.{name}={path}")]
    settings += ["--set", "data.hold_out=0.9", "--set", "train.validate_every=20"]
    assert learn.main([str(TINY), "--out", str(tmp_path / "run"), *settings]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["total"] for row in rows if "total" in row]
    assert losses[-1] < 0.8 * losses[0] and any("onset_f/drums" in str(row) for row in rows)
    reader = ScoreReader.from_pretrained(tmp_path / "run" / "final")
    assert reader.tokenizer_fingerprint and not (reader.thresholds == 0.5).all()
    assert set(reader.read(torch.randn(30, reader.config.feature_dim))) == {"drums", "bass", "other"}
    pytest.importorskip("tinysoundfont", reason="tinysoundfont is not installed")
    monkeypatch.setattr(sound_font, "SOUND_FONT_FOLDERS", (str(font.parent),))
    parts = {**tiny_components, "score_reader": tmp_path / "run" / "final"}
    bundle = assemble_bundle(tmp_path / "bundle", half=False, **parts)
    asked = Settings(
        corpus=tiny_corpus, bundle=bundle, items=2, seconds=4, tokens=tokens, manifest=data["manifest"]
    )
    figures = measure_notes(asked)
    assert figures["items"] >= 1 and 0 < figures["onset_f_drums"] <= 1
    assert all(-1 <= figures[f"chroma_correlation_{name}"] <= 1 for name in ("by_font", "of_true_notes"))
    assert figures["frechet_font"] > 0 and figures["frechet_rendered"] > 0
    capsys.readouterr()
    settings += ["--set", f"data.manifest={tiny_corpus / 'train.jsonl'}"]
    assert learn.main([str(TINY), "--out", str(tmp_path / "other"), *settings]) == 1
    assert "notes of a band" in capsys.readouterr().err
