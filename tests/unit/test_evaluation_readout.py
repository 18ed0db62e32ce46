"""What the evaluation says about read-outs and about encoding."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.evaluation import encoding_part, readout_part
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, read_test_items
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import TRACKS, DuoTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_components: dict[str, Path]) -> DuoTokenizer:
    return DuoTokenizer.from_pretrained(tiny_components["tokenizer"])


def test_chords_count_by_duration_and_only_where_they_are_major_or_minor():
    wanted = [(0.0, 2.0, "C:maj7"), (2.0, 4.0, "A:sus4"), (4.0, 8.0, "A:min"), (8.0, 10.0, "N")]
    found = [(0.0, 3.0, "C:maj"), (3.0, 5.0, "C:maj"), (5.0, 8.0, "A:min")]
    # The last two seconds are not covered, which is no chord.
    assert readout_part.compare_chords(found, wanted, 10.0) == pytest.approx((2 + 3 + 2, 8))
    assert readout_part.compare_chords(found, wanted, 6.0) == pytest.approx((2 + 1, 4))


@pytest.mark.parametrize(
    ("found", "wanted", "right"),
    [
        ("C:maj", "C:maj", (True, True)),
        ("A:min", "C:maj", (False, True)),
        ("C:maj", "A:min", (False, True)),
        ("D#:maj", "Eb:maj", (True, True)),
        ("C:min", "C:maj", (False, False)),
        ("G:maj", "C:maj", (False, False)),
        (None, "C:maj", (False, False)),
    ],
)
def test_keys_and_their_relatives(found, wanted, right):
    assert readout_part.compare_keys(found, wanted) == right


def test_sound_is_found_in_frames_of_the_tokens():
    wave = torch.zeros(1, 2, 2 * SAMPLE_RATE_HZ + 5)
    generator = torch.Generator().manual_seed(0)
    wave[..., SAMPLE_RATE_HZ:-5] = 0.01 * torch.randn(2, SAMPLE_RATE_HZ, generator=generator)
    assert readout_part.find_sound(wave).tolist() == [False] * 25 + [True] * 25 + [False]
    assert not readout_part.find_sound(torch.zeros(1, 2, 4_800)).any()


def test_the_constant_guess_takes_the_commonest(tiny_corpus):
    items = read_test_items(tiny_corpus)
    chords = [(0.0, 2.0, "A:min7"), (2.0, 8.0, "C:maj")]
    items = [replace(items[0], chords=chords, key="A:min"), *items[1:]]
    figures = readout_part.guess([Excerpt(item=item, start_seconds=0.0, seconds=8.0) for item in items])
    assert figures["chord_accuracy_constant"] == pytest.approx(22 / 24)
    assert figures["key_accuracy_constant"] == pytest.approx(2 / 3)
    assert figures["key_accuracy_or_relative_constant"] == 1.0
    assert 0 < figures["activity_f1_vocal_constant"] <= 1


def test_items_without_labels_are_left_out(tiny_corpus):
    items = read_test_items(tiny_corpus)
    settings = Settings(corpus=tiny_corpus, bundle=tiny_corpus)
    chosen = readout_part.choose_labelled([replace(items[0], chords=[]), *items[1:]], settings)
    assert [excerpt.item.id for excerpt in chosen] == [item.id for item in items[1:]]
    with pytest.raises(DataError, match="chords"):
        readout_part.choose_labelled([replace(item, key="") for item in items], settings)


def test_readouts_of_every_source_and_track(tiny_corpus, tiny_bundle):
    figures = readout_part.measure_readouts(Settings(corpus=tiny_corpus, bundle=tiny_bundle, items=2))
    names = ("chord_accuracy", "key_accuracy", "key_accuracy_or_relative", "activity_f1")
    sources = [f"{name}_{track}{ending}" for name in names for track in TRACKS for ending in ("", "_audio")]
    assert set(sources) <= set(figures)
    assert all(0 <= value <= 1 for name, value in figures.items() if name != "excerpts")
    assert figures["excerpts"] == 2
    # Notes of 0.45 s with gaps of 0.05 s: the audio tells where the singing is.
    assert figures["activity_f1_vocal_audio"] > 0.9


@pytest.fixture(scope="module")
def one_pass(tiny_components: dict[str, Path]) -> DuoTokenizer:
    return encoding_part.OnePassTokenizer.from_pretrained(tiny_components["tokenizer"])


def test_gain_and_chunks_leave_the_tokens(tokenizer, one_pass, tiny_corpus, monkeypatch):
    item = read_test_items(tiny_corpus)[0]
    wave = item.read("vocal")
    shares = encoding_part.compare_treatments(tokenizer, wave, "vocal")
    assert set(shares) == {"gain_plus_6_db_equal", "gain_minus_6_db_equal", "resampled_equal"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["gain_plus_6_db_equal"] > 0.95
    assert encoding_part.compare_chunks(tokenizer, one_pass, wave[None], "vocal") == 1.0
    monkeypatch.setattr(tokenizer, "CHUNK_FRAMES", 50)  # 8 s are now four chunks
    assert encoding_part.compare_chunks(tokenizer, one_pass, wave[None], "vocal") > 0.97


def test_chunks_without_overlap_are_noticed(tokenizer, one_pass, tiny_corpus, monkeypatch):
    wave = read_test_items(tiny_corpus)[0].read("accompaniment")[None]
    monkeypatch.setattr(tokenizer, "CHUNK_FRAMES", 10)
    monkeypatch.setattr(type(tokenizer.encoder.transformer), "reach_frames", -4)
    assert encoding_part.compare_chunks(tokenizer, one_pass, wave, "accompaniment") < 1.0


def test_songs_are_joined_to_the_wanted_length(tiny_corpus):
    items = read_test_items(tiny_corpus)
    wave = encoding_part.join_items(items, "vocal", 10.5)
    assert wave.shape == (2, round(10.5 * SAMPLE_RATE_HZ))
    assert torch.equal(wave[:, : 8 * SAMPLE_RATE_HZ], items[0].read("vocal"))


def test_a_file_keeps_the_length_and_nearly_the_sound():
    times = torch.arange(SAMPLE_RATE_HZ + 13) / SAMPLE_RATE_HZ
    wave = 0.3 * torch.sin(2 * torch.pi * 440 * times).repeat(2, 1)
    back = encoding_part.through_file(wave)
    assert back.shape == wave.shape
    assert not torch.equal(back, wave)
    assert torch.allclose(back[:, 500:-500], wave[:, 500:-500], atol=2e-3)


def test_equal_shares_and_speed(tokenizer):
    assert encoding_part.share_equal(
        torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0]])
    ) == pytest.approx(2 / 3)
    before = torch.get_num_threads()
    assert encoding_part.time_encoding(tokenizer, 0.1 * torch.randn(1, 1, SAMPLE_RATE_HZ), "vocal") > 0
    assert torch.get_num_threads() == before


def test_encoding_figures(tiny_corpus, tiny_bundle):
    settings = Settings(corpus=tiny_corpus, bundle=tiny_bundle, items=2, seconds=4.0, speed=False)
    figures = encoding_part.measure_encoding(settings)
    assert not [name for name in figures if "real_time" in name or "per_second" in name]
    shares = [value for name, value in figures.items() if name.endswith("_equal")]
    assert len(shares) == 8 and all(0 <= share <= 1 for share in shares)
    assert figures["song_seconds"] == 4.0
    assert np.isfinite(list(figures.values())).all()
