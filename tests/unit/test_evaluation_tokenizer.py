"""What the evaluation says about read-outs, encoding and lyrics, and about separation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duotok.recipes.evaluation import tokenizer_part
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, join_items, read_split
from duotok.recipes.evaluation.separation_part import improvements, si_sdr
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
    assert tokenizer_part.compare_chords(found, wanted, 10.0) == pytest.approx((2 + 3 + 2, 8))
    assert tokenizer_part.compare_chords(found, wanted, 6.0) == pytest.approx((2 + 1, 4))


def test_keys_and_their_relatives():
    right = {("C:maj", "C:maj"), ("D#:maj", "Eb:maj")}
    near = {("A:min", "C:maj"), ("C:maj", "A:min"), *right}
    for pair in (*near, ("C:min", "C:maj"), ("G:maj", "C:maj"), (None, "C:maj")):
        assert tokenizer_part.compare_keys(*pair) == (pair in right, pair in near), pair


def test_sound_is_found_in_frames_of_the_tokens():
    wave = torch.zeros(1, 2, 2 * SAMPLE_RATE_HZ + 5)
    generator = torch.Generator().manual_seed(0)
    wave[..., SAMPLE_RATE_HZ:-5] = 0.01 * torch.randn(2, SAMPLE_RATE_HZ, generator=generator)
    assert tokenizer_part.find_sound(wave).tolist() == [False] * 25 + [True] * 25 + [False]
    assert not tokenizer_part.find_sound(torch.zeros(1, 2, 4_800)).any()


def test_the_constant_guess_takes_the_commonest(tiny_corpus):
    items = read_split(tiny_corpus)
    chords = [(0.0, 2.0, "A:min7"), (2.0, 8.0, "C:maj")]
    items = [replace(items[0], chords=chords, key="A:min"), *items[1:]]
    figures = tokenizer_part.guess([Excerpt(item=item, start_seconds=0.0, seconds=8.0) for item in items])
    assert figures["chord_accuracy_constant"] == pytest.approx(22 / 24)
    assert figures["key_accuracy_constant"] == pytest.approx(2 / 3)
    assert figures["key_accuracy_or_relative_constant"] == 1.0


def test_items_without_labels_are_left_out(tiny_corpus):
    items = read_split(tiny_corpus)
    settings = Settings(corpus=tiny_corpus, bundle=tiny_corpus)
    chosen = tokenizer_part.choose_labelled([replace(items[0], chords=[]), *items[1:]], settings)
    assert [excerpt.item.id for excerpt in chosen] == [item.id for item in items[1:]]
    with pytest.raises(DataError, match="chords"):
        tokenizer_part.choose_labelled([replace(item, key="") for item in items], settings)


def test_readouts_of_every_source_and_track(tiny_corpus, tiny_bundle):
    figures = tokenizer_part.measure_readouts(Settings(corpus=tiny_corpus, bundle=tiny_bundle, items=2))
    names = ("chord_accuracy", "key_accuracy", "key_accuracy_or_relative", "activity_f1")
    sources = [f"{name}_{track}{ending}" for name in names for track in TRACKS for ending in ("", "_audio")]
    assert {*sources, "activity_f1_vocal_constant"} <= set(figures)
    assert all(
        0 <= value <= 1 for name, value in figures.items() if not name.endswith(("excerpts", "songs_in_4"))
    )
    assert figures["excerpts"] == 2
    # Notes of 0.45 s with gaps of 0.05 s: the audio tells where the singing is.
    assert figures["activity_f1_vocal_audio"] > 0.9


def test_gain_and_chunks_leave_the_tokens(tokenizer, tiny_components, tiny_corpus, monkeypatch):
    one_pass = tokenizer_part.OnePassTokenizer.from_pretrained(tiny_components["tokenizer"])
    item = read_split(tiny_corpus)[0]
    wave = item.read("vocal")
    shares = tokenizer_part.compare_treatments(tokenizer, wave, "vocal")
    assert set(shares) == {"gain_plus_6_db_equal", "gain_minus_6_db_equal", "resampled_equal"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["gain_plus_6_db_equal"] > 0.95
    assert tokenizer_part.compare_chunks(tokenizer, one_pass, wave[None], "vocal") == 1.0
    monkeypatch.setattr(tokenizer, "CHUNK_FRAMES", 50)  # 8 s are now four chunks
    assert tokenizer_part.compare_chunks(tokenizer, one_pass, wave[None], "vocal") > 0.97
    monkeypatch.setattr(tokenizer, "CHUNK_FRAMES", 10)
    monkeypatch.setattr(type(tokenizer.encoder.transformer), "reach_frames", -4)  # chunks without overlap
    band = item.read("accompaniment")[None]
    assert tokenizer_part.compare_chunks(tokenizer, one_pass, band, "accompaniment") < 1.0


def test_songs_are_joined_to_the_wanted_length(tiny_corpus):
    items = read_split(tiny_corpus)
    wave = join_items(items, "vocal", 10.5)
    assert wave.shape == (2, round(10.5 * SAMPLE_RATE_HZ))
    assert torch.equal(wave[:, : 8 * SAMPLE_RATE_HZ], items[0].read("vocal"))


def test_a_file_keeps_the_length_and_nearly_the_sound():
    times = torch.arange(SAMPLE_RATE_HZ + 13) / SAMPLE_RATE_HZ
    wave = 0.3 * torch.sin(2 * torch.pi * 440 * times).repeat(2, 1)
    back = tokenizer_part.through_file(wave)
    assert back.shape == wave.shape
    assert not torch.equal(back, wave)
    assert torch.allclose(back[:, 500:-500], wave[:, 500:-500], atol=2e-3)


def test_equal_shares_and_speed(tokenizer):
    equal = tokenizer_part.share_equal(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0]]))
    assert equal == pytest.approx(2 / 3)
    before = torch.get_num_threads()
    assert tokenizer_part.time_encoding(tokenizer, 0.1 * torch.randn(1, 1, SAMPLE_RATE_HZ), "vocal") > 0
    assert torch.get_num_threads() == before


def test_si_sdr_of_known_noise_whatever_the_gain():
    generator = torch.Generator().manual_seed(0)
    target, noise = torch.randn(2, 48_000, generator=generator), torch.randn(2, 48_000, generator=generator)
    noise -= target * (noise * target).sum() / target.square().sum()  # nothing of the target in it
    noise *= target.norm() / noise.norm()
    for gain in (0.1, 3.0):
        assert si_sdr(gain * (target + 0.1 * noise), target) == pytest.approx(20, abs=0.05)
    assert si_sdr(noise, target) < -60


def test_improvement_is_over_the_mix_and_leaves_silent_stems_out():
    generator = torch.Generator().manual_seed(1)
    truth = {stem: torch.randn(2, 24_000, generator=generator) for stem in ("vocal", "drums")}
    truth["bass"] = torch.zeros(2, 24_000)
    mix = sum(truth.values())
    found = {"vocal": truth["vocal"] + 0.1 * truth["drums"], "drums": mix, "bass": mix}
    gains = improvements(found, truth, mix)
    assert set(gains) == {"vocal", "drums"}
    assert gains["vocal"] == pytest.approx(20, abs=0.3) and gains["drums"] == pytest.approx(0, abs=1e-6)


def test_edit_distance():
    for found, distance in (([], 3), ([1, 2, 3], 0), ([1, 3], 1), ([4, 1, 2], 2)):
        assert tokenizer_part.edit_distance(found, [1, 2, 3]) == distance
        assert tokenizer_part.edit_distance([1, 2, 3], found) == distance
