"""Songs of any length, the beat across joints, and keys by windows."""

import numpy as np
import pytest
import torch

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.sampling import WindowSampler
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.evaluation import long_part
from duotok.recipes.evaluation.audio_metrics import find_joints, find_middles, phase_errors
from duotok.recipes.evaluation.excerpts import read_split
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.tempo import onset_envelope


def test_joints_of_180_s():
    found = find_joints(4500, SamplingConfig())
    assert found == [750, 1450, 2150, 2850, 3550, 4250]  # a window of 750 goes on from 50
    assert find_middles(4500, found)[:2] == [375, 1100]
    assert find_joints(750, SamplingConfig()) == []


def test_joints_are_where_the_sampler_begins_a_window(tiny_bundle, monkeypatch):
    begun = []
    sample = WindowSampler.sample

    def record(self, source, prefix, *rest):
        begun.append(int(source[0]) + prefix.shape[1])
        return sample(self, source, prefix, *rest)

    monkeypatch.setattr(WindowSampler, "sample", record)
    lm = DualTrackLM.from_pretrained(tiny_bundle / "lm")
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


def test_items_without_bars_are_left_out(tiny_corpus, tmp_path):
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
