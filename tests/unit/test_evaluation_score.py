"""Every part of the evaluation on real components of tiny size: names, ranges, repeatability."""

import json

import pytest

from duotok.recipes.accompany.bundle import assemble_bundle
from duotok.recipes.evaluation import decoding_part, results, score, speed, table, tuning_part

# Names that others rely on, beside those of the table.
PROMISED = ("quality.accompaniment_generated_mel_distance", "quality.vocal_vae_chroma_correlation")
SPEED = (
    "generate.rtf_30s",
    "generate.rtf_180s",
    "generate.first_sound_seconds",
    "generate.peak_memory_gb",
    "encoding.vocal_times_real_time",
    "encoding.accompaniment_times_real_time",
    "renderer.seconds_per_second",
    "decoding.lm_seconds_per_second",
    "decoding.lm_seconds_per_second_4",
    "decoding.times_faster_than_plain_loop",
)
# What excerpts of 4 s are too short for.
LONGER = (
    "lm.shift_4s_cost_percent",
    *(
        f"lm.context_cnbpt_{series}_{seconds}s"
        for series in ("vocal_to_accompaniment", "unconditional_accompaniment")
        for seconds in (5, 10, 20, 30)
    ),
    "long.joint_beat_error_sound",
    "long.inside_beat_error_sound",
)
# What a package, a style or a decoder is needed for that the tests do without.
OPTIONAL = (
    "quality.frechet_same_style",
    "quality.frechet_other_style",
    "quality.kernel_distance_other_style",
    "quality.accompaniment_other_style_frechet_standardized",
    "quality.vocal_round_trip_pesq",
    "quality.vocal_round_trip_stoi",
)


def run(part, corpus, bundle, out) -> int:
    options = ["--corpus", str(corpus), "--bundle", str(bundle), "--out", str(out)]
    options += ["--items", "3", "--seconds", "4", "--no-speed"]
    # A synthetic item and its stems stand for a real song.
    real = str(corpus / "audio" / "test" / "0")
    return score.main([part, *options, "--real-stems", real, "--recordings", real])


@pytest.fixture(scope="module")
def whole_bundle(tiny_components, tiny_separator, tmp_path_factory):
    """A bundle with everything that can be measured."""
    return assemble_bundle(
        tmp_path_factory.mktemp("model") / "whole", separator=tiny_separator, **tiny_components
    )


@pytest.fixture(scope="module")
def figures(tiny_corpus, whole_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_part, "GUIDANCES", (1.0,))
        patch.setattr(tuning_part, "CENTS", (-50, 0))
        assert run("all", tiny_corpus, whole_bundle, path) == 0
    return json.loads(path.read_text())


def test_all_promised_figures_are_there(figures):
    assert set(PROMISED) <= set(figures)
    assert {name.split(".")[0] for name in figures} == set(score.PARTS)
    assert not set(SPEED) & set(figures)  # --no-speed


def test_figures_are_in_their_ranges(figures):
    for name, value in figures.items():
        shares = ("utilization", "entropy", "in_key", "beat_f", "acc_at", "_equal")
        if "generated_entropy" in name:  # over that of the true codes
            assert value > 0, name
        elif any(share in name for share in shares):
            assert 0 <= value <= 1, name
        if "correlation" in name:
            assert -1 <= value <= 1, name
        if "harmony" in name:
            assert 0 <= value <= 12, name
    assert figures["generate.wrong_lengths"] == 0
    assert 0 < figures["generate.peak"] < 1
    assert figures["generate.loudness_difference_largest_lu"] < 12
    silent = ("harmony_silence", "in_key_silence", "beat_f_silence")
    assert [figures[f"generate.{name}"] for name in silent] == [0, 0, 0]
    assert 0.8 < figures["lm.cnbpt_unconditional_accompaniment"] < 1.5  # untrained: about a uniform guess


def test_the_real_pair_beats_the_mismatched_one(figures):
    # The synthetic songs move up a semitone from one to the next; their beats are the same.
    assert figures["generate.in_key_real"] > figures["generate.in_key_real_mismatched"] + 0.2
    assert figures["generate.harmony_real"] > figures["generate.harmony_real_mismatched"]


def test_every_row_of_the_table_has_its_figures(figures):
    known = {**figures, **dict.fromkeys((*SPEED, *LONGER, *OPTIONAL), 1.0)}
    rows = [row for rows in table.ROWS.values() for row in rows]
    # Whole songs, meters and singers are corpora of their own, styles and notes need more of a model: other
    # tests do.
    others = ("whole.", "meter.", "style.", "notes.", "singers.")
    known |= {key: 1.0 for row in rows for key in row.keys if key.startswith(others)}
    assert [row.label for row in rows if not set(row.keys) <= set(known)] == []
    assert len(table.render_table(known).splitlines()) == 2 + len(rows) + len(table.ROWS)


def test_what_a_bundle_does_not_have_is_left_out(tiny_corpus, tiny_bundle, tmp_path):
    out = tmp_path / "results.json"
    assert run("separation", tiny_corpus, tiny_bundle, out) == 0
    assert json.loads(out.read_text()) == {}


def test_the_same_seed_gives_the_same_figures(figures, tiny_corpus, tiny_bundle, tmp_path):
    out = tmp_path / "results.json"
    results.merge_results(out, "tokenizer", {"kept": 1.0})
    assert run("lm", tiny_corpus, tiny_bundle, out) == 0
    assert json.loads(out.read_text()) == {
        "tokenizer.kept": 1.0,
        **{name: value for name, value in figures.items() if name.startswith("lm.")},
    }


def test_speed_is_measured_in_a_process_of_its_own(vocal_file, tiny_bundle):
    timing = speed.time_in_subprocess(vocal_file, tiny_bundle, first_sound=True)
    assert timing["audio_seconds"] == pytest.approx(2.5, abs=0.01)
    assert timing["compute_seconds"] > 0 and timing["load_seconds"] > 0
    assert timing["first_sound_seconds"] > timing["load_seconds"]
    assert 0.1 < timing["peak_memory_gb"] < 4
