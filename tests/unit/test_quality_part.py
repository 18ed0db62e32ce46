"""Quality by one command on real components of tiny size: figures, table, picture, going on."""

import json
import math

import pytest

pytest.importorskip("librosa")
from duotok.recipes.evaluation import music_features, quality_part, score, voice_metrics  # noqa: E402
from duotok.recipes.evaluation.music_features import MusicFeatures  # noqa: E402
from duotok.recipes.evaluation.quality_sounds import SOUNDS, SoundMaker  # noqa: E402

SPECTRAL = ("chroma_correlation", "fine_structure_50_300_hz", "log10_mel_l1", "mel_distance")
OTHERS = ("stereo_width_error_db", "level_error_lu", "frechet", "frechet_all")


@pytest.fixture(scope="module")
def measured(tiny_corpus, tiny_bundle, musicnn_weights, tmp_path_factory):
    """Run the command twice; (folder, figures, figures of the second run, which may make no sound)."""
    root = tmp_path_factory.mktemp("quality")
    options = ["quality", "--corpus", str(tiny_corpus), "--bundle", str(tiny_bundle)]
    options += ["--items", "2", "--seconds", "4"]
    with pytest.MonkeyPatch.context() as patch:
        # The network is musicnn's, its weights are random: the package need not be installed.
        patch.setattr(quality_part, "has_music_features", lambda: True)
        patch.setattr(MusicFeatures, "from_package", classmethod(lambda cls: MusicFeatures(musicnn_weights)))
        assert score.main([*options, "--out", str(root / "results.json")]) == 0
        figures = json.loads((root / "results.json").read_text())

        def make_nothing(*arguments):
            raise AssertionError("what was kept is measured again")

        patch.setattr(SoundMaker, "make", make_nothing)
        again = ["--out", str(root / "again.json"), "--folder", str(root / "quality")]
        assert score.main([*options, *again]) == 0
    return root / "quality", figures, json.loads((root / "again.json").read_text())


def test_every_sound_has_every_measure(measured):
    folder, figures, _ = measured
    found = {name.removeprefix("quality.") for name in figures}
    assert all(name.startswith("quality.") and math.isfinite(value) for name, value in figures.items())
    for measure in (*SPECTRAL, *OTHERS):
        for sound in set(SOUNDS) - {"original"}:
            # As a set, the other songs are the same songs.
            expected = not (sound == "shuffled" and measure.startswith("frechet"))
            assert (f"accompaniment_{sound}_{measure}" in found) == expected, (sound, measure)
        assert f"vocal_vae_{measure}" in found
    assert "vocal_round_trip_mel_distance" not in found  # this bundle has no decoder of it
    assert figures["quality.excerpts"] == 2 and figures["quality.excerpt_seconds"] == 4


def test_the_references_span_the_scale(measured):
    told = json.loads((measured[0] / "quality.json").read_text())
    sounds = told["tracks"]["accompaniment"]
    perfect = {name: found["mean"] for name, found in sounds["original"].items()}
    assert perfect["chroma_correlation"] > 0.99 and perfect["log10_mel_l1"] == 0
    assert [perfect[name] for name in OTHERS] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    for measure in ("log10_mel_l1", "mel_distance", "level_error_lu"):
        assert sounds["silent"][measure]["mean"] > sounds["shuffled"][measure]["mean"] > 0
    for sound in ("shuffled", "random", "silent"):
        assert sounds[sound]["chroma_correlation"]["mean"] < 0.9
    assert sounds["silent"]["frechet"]["mean"] > 0 and sounds["random"]["frechet"]["mean"] > 0
    assert sounds["shuffled"]["mel_distance"]["count"] == 2
    assert sounds["shuffled"]["mel_distance"]["margin"] > 0


def test_the_second_run_listens_to_nothing_again(measured):
    assert measured[1] == measured[2]


def test_table_and_picture_are_written(measured):
    folder, figures, _ = measured
    table = (folder / "quality.md").read_text()
    for name in SOUNDS.values():
        assert f"| {name} |" in table
    assert "## Accompaniment" in table and "## Vocal" in table
    assert f"{figures['quality.accompaniment_vae_mel_distance']:.2f}" in table
    assert "| *paper, round trip* |" in table and "| 1.14 |" in table
    assert "round trip of the vocal: this bundle has no decoder of it" in table
    assert "there must be two styles" in table
    assert (folder / "quality.png").stat().st_size > 30_000


def test_missing_packages_are_told_and_nothing_else_is_lost(monkeypatch):
    monkeypatch.setattr(voice_metrics, "find_spec", lambda name: None)
    monkeypatch.setattr(music_features, "find_spec", lambda name: None)
    listener = quality_part.Listener()
    assert listener.measures == [] and listener.music is None
    assert listener.left_out == [
        "PESQ: pip install pesq",
        "STOI: pip install pystoi",
        "Frechet distances: pip install --no-deps musicnn",
    ]
