"""Sets of generated songs: a sweep goes on where it stopped, probes tell styles and drums apart."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.corpus.manifest import read_manifest, write_manifest
from duotok.recipes.evaluation import score, style_part, sweep_part, table
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.recipes.evaluation.style_part import Probe, ask_for_styles, cut_bars
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard

SECONDS, FRAMES = 8.0, 200


def test_a_sweep_goes_on_where_it_stopped(tiny_corpus, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_part, "AXES", {"candidates": (1,)})
    options = ["--corpus", str(tiny_corpus), "--bundle", str(tiny_bundle), "--out", str(tmp_path / "r.json")]
    options += ["--items", "2", "--seconds", "4"]
    assert score.main(["sweep", *options]) == 0
    points = sorted((tmp_path / "sweep").glob("*.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "sweep.excerpts": 2,
        "sweep.points": len(points) - 1,
    }
    reference = json.loads((tmp_path / "sweep" / "round-trip.json").read_text())
    assert reference["figures"]["entropy"] == reference["figures"]["distinct_4_grams"] == 1
    assert set(reference["errors"]) == set(reference["figures"]) > {"kernel_distance", "spread", "harmony"}
    (tmp_path / "sweep" / "sweep.png").unlink()
    points[0].write_text('{"made_with": "another bundle"}')
    kept = {path: path.stat().st_mtime_ns for path in points[1:]}
    assert score.main(["sweep", *options]) == 0
    assert "figures" in json.loads(points[0].read_text()) and (tmp_path / "sweep" / "sweep.png").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, tiny_bundle):
    """(folder, manifest path, items): two styles of codes that never meet; drums play in every second bar."""
    folder = tmp_path_factory.mktemp("tokens")
    fingerprint = json.loads((tiny_bundle / "bundle.json").read_text())["tokenizer_fingerprint"]
    sizes = {"vocal": 64, "accompaniment": 64}
    index = TokenIndex(tokenizer_fingerprint=fingerprint, codebook_sizes=sizes, frame_rate_hz=25.0)
    rng, pairs, styles = np.random.default_rng(0), {}, {}
    for number in range(40):
        codes = rng.integers(0, 16, FRAMES) + 32 * (number % 2)
        for bar in range(1, 4, 2):
            codes[50 * bar : 50 * bar + 50] += 16  # without drums
        name = f"item-{number}"
        styles[name] = ("ballad", "rock")[number % 2]
        codes = torch.from_numpy(codes)
        pairs[name] = (f"song {number}", "train", {"vocal": codes, "accompaniment": codes})
    append_shard(folder, index, pairs)
    return folder, styles


def make_items(tiny_corpus, styles, *, band=False):
    item = read_manifest(tiny_corpus / "train.jsonl")[0]
    strokes = [(start, start + 0.1, 36, 90) for start in (0.0, 1.0, 4.0, 5.0)]
    played = {"drums": [(0, True, strokes)], "bass": [], "other": []} if band else {}
    return [replace(item, id=name, style=style, band=played) for name, style in styles.items()]


def test_styles_are_asked_for_of_a_model_that_knows_some_and_another_is_told_of(
    tokens, tiny_corpus, tiny_bundle, tmp_path, capsys, monkeypatch
):
    folder, styles = tokens
    write_manifest(tmp_path / "items.jsonl", make_items(tiny_corpus, styles))
    options = ["--corpus", str(tiny_corpus), "--bundle", str(tiny_bundle), "--out", str(tmp_path / "r.json")]
    options += ["--items", "2", "--seconds", "4"]
    assert score.main(["style", *options]) == 1
    assert "--tokens" in capsys.readouterr().err
    options += ["--tokens", str(folder)]
    assert score.main(["style", *options]) == 1  # the corpus' own training items are others
    assert "none of the items" in capsys.readouterr().err
    options += ["--manifest", str(tmp_path / "items.jsonl")]
    assert score.main(["style", *options]) == 0
    assert "the probe of drums" in capsys.readouterr().err  # nobody knows these items' bands
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["style.style_probe_accuracy"] == 1
    heard = [name for name in figures if name.endswith("_heard")]
    assert heard == ["style.asked_ballad_heard", "style.asked_heard", "style.asked_rock_heard"]
    assert 0 <= figures["style.bars_with_drums_without_drums"] <= 1
    monkeypatch.setattr(DualTrackLM, "band", None)
    assert score.main(["style", *options]) == 0
    assert "left out: styles asked for; this model knows none" in capsys.readouterr().err
    assert not any("asked" in name for name in json.loads((tmp_path / "r.json").read_text()))


def test_bars_without_drums_are_told_by_their_codes(tokens, tiny_corpus):
    folder, styles = tokens
    items = {item.id: item for item in make_items(tiny_corpus, styles, band=True)}
    learned, held_out = cut_bars(TokenShards(folder), items)
    assert held_out[1].count("drums") == 2 * held_out[1].count("none") > 0
    probe = Probe.learn(*learned, 64)
    assert probe.tell(held_out[0]) == held_out[1]
    chance = Probe.learn(learned[0], list(np.random.default_rng(0).permutation(learned[1])), 64)
    assert chance.tell(held_out[0]) != held_out[1]


class Obedient:
    """Plays whichever style it is asked for, with drums unless told to leave them out."""

    bundle = SimpleNamespace(tokenizer=SimpleNamespace(frame_rate_hz=25.0))

    def compose(self, vocal, *, seed, style):
        codes = torch.full((FRAMES,), 32 if style == "rock" and seed else 0)
        return SimpleNamespace(ranked=[SimpleNamespace(codes=codes)])

    def accompany(self, vocal, *, seed, without):
        codes = torch.full((FRAMES,), 16 if "drums" in without else 0)
        clicks = torch.zeros(2, round(48_000 * SECONDS))
        clicks[:, ::24_000] = 0.0 if "drums" in without else 1.0
        return SimpleNamespace(codes=codes, accompaniment=clicks)


def test_what_is_asked_for_is_counted_where_it_is_heard(tiny_corpus, tiny_bundle):
    excerpts = excerpts_of(Settings(corpus=tiny_corpus, bundle=tiny_bundle, items=2, seconds=SECONDS))
    codes = [torch.full((50,), code) for code in (0, 16, 32, 48)]
    probes = {
        "style": Probe.learn(codes, ["bossa", "bossa", "rock", "rock"], 64),
        "drums": Probe.learn(codes, ["drums", "none", "drums", "none"], 64),
    }
    figures = ask_for_styles(Obedient(), excerpts, probes, ("bossa", "rock", "unheard of"), 0)
    assert (figures["asked_bossa_heard"], figures["asked_rock_heard"], figures["asked_heard"]) == (
        1,
        0.5,
        0.75,
    )
    assert (figures["drums_probe_asked"], figures["drums_probe_without_drums"]) == (1, 0)
    assert (figures["bars_with_drums_asked"], figures["bars_with_drums_without_drums"]) == (1, 0)
    keys = {key for rows in table.ROWS.values() for row in rows for key in row.keys}
    promised = {key.removeprefix("style.") for key in keys if key.startswith("style.")}
    assert promised - set(figures) == {"style_probe_accuracy", "drums_probe_balanced_accuracy"}
    assert style_part.score_probe("style", ["a", "a", "a", "b"], ["a", "a", "a", "a"]) == {
        "style_probe_accuracy": 0.75,
        "style_probe_balanced_accuracy": 0.5,
        "style_probe_pieces": 4,
    }
