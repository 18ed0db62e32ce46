"""What is composed: guidance, ranking, the plain loop that decoding is timed against; songs of any length."""

import numpy as np
import pytest
import torch

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.sampling import WindowSampler
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.evaluation import decoding_part, long_part
from duotok.recipes.evaluation.audio_metrics import find_joints, find_middles, phase_errors
from duotok.recipes.evaluation.excerpts import read_split
from duotok.recipes.evaluation.heard_coherence import Coherence
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.tempo import onset_envelope


@pytest.fixture
def lm(tiny_bundle) -> DualTrackLM:
    return DualTrackLM.from_pretrained(tiny_bundle / "lm")


def outcome(in_keys, first: float, best: float) -> decoding_part.Outcome:
    def heard(value: float) -> Coherence:
        return Coherence(harmony=value, in_key=value, beat_f=value)

    return decoding_part.Outcome(
        tokens=[{"in_key": value, "harmony": 2 * value} for value in in_keys],
        sound_first=heard(first),
        sound_best=heard(best),
    )


OUTCOMES = {
    1.0: [outcome((0.4, 0.2), 0.1, 0.5), outcome((0.6, 0.4), 0.3, 0.3)],
    3.0: [outcome((0.9, 0.5), 0.6, 0.8), outcome((0.7, 0.7), 0.4, 0.2)],
}


def test_curves_name_the_best_guidance():
    figures = decoding_part.describe_curves(decoding_part.draw_curves(OUTCOMES))
    assert figures["in_key_guidance_1"] == pytest.approx(0.4)
    assert figures["harmony_guidance_3"] == pytest.approx(1.4)
    assert figures["best_guidance"] == figures["best_guidance_sound"] == 3.0
    assert figures["in_key_best_guidance"] == pytest.approx(0.7)
    assert figures["in_key_sound_best_guidance"] == pytest.approx(0.5)


def test_ranking_is_compared_with_a_single_draw_and_the_best_possible():
    figures = decoding_part.describe_ranking([outcome((0.5, 0.9), 0.1, 0.5), outcome((0.8, 0.4), 0.3, 0.3)])
    assert figures["in_key_single"] == pytest.approx(0.65)
    assert figures["in_key_ranked"] == pytest.approx(0.65)
    assert figures["in_key_oracle"] == pytest.approx(0.85)
    assert figures["in_key_ranking_error"] == pytest.approx(0.2)
    assert figures["harmony_sound_ranked"] - figures["harmony_sound_single"] == pytest.approx(0.2)


def test_the_picture_of_guidance(tmp_path):
    path = tmp_path / "plots" / "guidance.png"
    references = {"in_key": 0.9, "harmony": 1.5}
    decoding_part.draw_guidance(decoding_part.draw_curves(OUTCOMES), references, "Guidance", path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_plain_loop_samples_the_same_codes(lm, guidance):
    vocal = torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(guidance=guidance)
    ours = lm.compose(vocal, seeds=[3], sampling=config).codes[0]
    backbone = decoding_part.as_transformers(lm)
    assert torch.equal(decoding_part.generate_plainly(lm, backbone, vocal, 3, config), ours)
    with pytest.raises(ConfigError, match="one window"):
        short = SamplingConfig(window_frames=10, overlap_frames=2)
        decoding_part.generate_plainly(lm, backbone, vocal, 3, short)


@torch.no_grad()
def test_the_backbone_is_that_of_transformers(lm):
    for parameter in lm.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden, positions = torch.randn(2, 9, lm.config.hidden_dim), torch.arange(9).expand(2, 9)
    theirs = decoding_part.as_transformers(lm)(inputs_embeds=hidden, position_ids=positions)
    torch.testing.assert_close(lm.backbone(hidden, positions), theirs.last_hidden_state)


def test_timing_counts_seconds_of_audio(lm):
    figures = decoding_part.time_decoding(lm, torch.zeros(10).long(), 25.0, 2.0)
    assert figures["plain_loop_equal_codes"] == 1.0
    ratio = figures["plain_loop_seconds_per_second"] / figures["lm_seconds_per_second"]
    assert figures["times_faster_than_plain_loop"] == pytest.approx(ratio)
    assert figures["cost_of_4_candidates"] > 0
    reading = figures["bound_megabytes_per_frame"] / figures["bound_gigabytes_per_second"] / 1e3
    operators = figures["bound_operators_per_frame"] * figures["bound_operator_microseconds"] / 1e6
    assert figures["bound_seconds_per_second"] == pytest.approx(25 * (reading + operators))
    assert 50 < figures["bound_operators_per_frame"] < 500


def test_joints_of_180_s():
    found = find_joints(4500, SamplingConfig())
    assert found == [750, 1450, 2150, 2850, 3550, 4250]  # a window of 750 goes on from 50
    assert find_middles(4500, found)[:2] == [375, 1100]
    assert find_joints(750, SamplingConfig()) == []


def test_joints_are_where_the_sampler_begins_a_window(lm, monkeypatch):
    begun = []
    sample = WindowSampler.sample

    def record(self, source, prefix, *rest):
        begun.append(int(source[0]) + prefix.shape[1])
        return sample(self, source, prefix, *rest)

    monkeypatch.setattr(WindowSampler, "sample", record)
    config = SamplingConfig(window_frames=12, overlap_frames=4)
    lm.compose(torch.arange(41), seeds=[0], sampling=config)
    assert begun == [0, *find_joints(41, config)] and len(begun) > 3


def clicks(times, seconds=60.0):
    envelope = np.zeros(round(seconds * 100))
    envelope[np.round(np.asarray(times) * 100).astype(int)] = 1.0
    return envelope


def test_the_beat_moves_where_it_is_moved():
    beats = np.arange(0, 60, 0.6)
    late = np.where(beats < 30, beats, beats + 0.15)  # a quarter of a beat
    found = phase_errors(clicks(late[late < 59.9]), beats, [3.0, 15.0, 30.0, 45.0, 58.0])
    assert found == pytest.approx([0.0, 0.25, 0.0], abs=1e-6)  # too near to the ends: left out
    assert phase_errors(np.zeros(6000), beats, [30.0]) == []
    # By chance it moves by a quarter of a beat.
    rng = np.random.default_rng(0)
    noise = [phase_errors(rng.random(6000), beats, [10.0, 30.0, 50.0]) for _ in range(300)]
    assert np.mean(noise) == pytest.approx(0.25, abs=0.02)


def test_bars_are_repeated_in_time(tiny_corpus):
    (item, *_) = long_part.choose_items(read_split(tiny_corpus), 2, seed=0)
    song = long_part.repeat_bars(item, 20.0)
    bars = 6 * SAMPLE_RATE_HZ  # from the bar line at 0 s to that at 6 s
    assert song.vocal.shape == song.accompaniment.shape == (2, 20 * SAMPLE_RATE_HZ)
    assert torch.equal(song.vocal[:, :bars], song.vocal[:, bars : 2 * bars])
    assert torch.equal(song.accompaniment[:, :bars], item.read("accompaniment", seconds=6.0))
    assert song.beats_seconds == pytest.approx(np.arange(0, 20, 0.5))
    # The drums of the item click on the beat, through all repetitions.
    drums = item.read("drums", seconds=6.0).repeat(1, 4)[:, : 20 * SAMPLE_RATE_HZ]
    errors = phase_errors(onset_envelope(drums), song.beats_seconds, [6.5, 9.0, 12.0])
    assert len(errors) == 3 and max(errors) < 0.02


def test_items_without_bars_are_left_out(tiny_corpus):
    items = read_manifest(tiny_corpus / "test.jsonl")
    chosen = long_part.choose_items(items, 10, seed=1)
    assert sorted(item.id for item in chosen) == sorted(item.id for item in items)
    assert long_part.choose_items(items, 2, seed=1) == chosen[:2]
    without = [type(item)(**{**vars(item), "downbeats_seconds": []}) for item in items]
    with pytest.raises(DataError, match="two bars"):
        long_part.choose_items(without, 2, seed=0)


def test_windows_and_their_figures():
    told = ReadOut(mel=torch.zeros(1, 4 * 25 * 70, 3), chroma=torch.zeros(1, 2 * 25 * 70, 12))
    assert [len(window.chroma[0]) for window in long_part.cut_windows(told, 25.0)] == [1500, 1500]
    hearings = [
        long_part.Hearing(keys_agree=[True, False], joint_errors=[0.1, 0.3], inside_errors=[0.1]),
        long_part.Hearing(keys_agree=[True, True], joint_errors=[], inside_errors=[0.3]),
    ]
    figures = long_part.describe(hearings)
    assert figures["key_agreement"] == 0.75 and figures["key_windows"] == 4
    assert figures["joint_beat_error"] == pytest.approx(0.2) == figures["inside_beat_error"]
    assert figures["joint_beat_error_standard_error"] == pytest.approx(0.1)
