"""Probes on codes: they find what is in the codes, and nothing where there is nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.research.probe import (
    MEL_BANDS,
    UNKNOWN,
    ConformerConfig,
    ConformerProbe,
    Recordings,
    class_shares,
    clip_starts,
    fit_linear,
    label_items,
    mel_frames,
    name_labels,
    pool_codes,
    predict_conformer,
    score_classes,
    split_songs,
    stack_clips,
    train_conformer,
)
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.spectra import LogMel

CODES, FRAMES = 16, 60
VECTORS = {
    track: torch.randn(CODES, 4, generator=torch.Generator().manual_seed(seed))
    for seed, track in enumerate(("vocal", "accompaniment"))
}
LABELS = {
    "range": ("low", "high"),  # which half of the codes the vocal uses
    "pulse": ("even", "odd", "none"),  # codes 0 and 1 of the band
}
CONFIG = ConformerConfig(
    clip_frames=20,
    epochs=6,
    batch=8,
    learning_rate=5e-3,
    dim=16,
    heads=2,
    blocks=1,
    kernel=5,
    stride=2,
    dropout=0.0,
)


def make_set(count: int, seed: int) -> Recordings:
    rng = np.random.default_rng(seed)
    truth = {"range": rng.integers(2, size=count), "pulse": rng.integers(3, size=count)}
    codes = []
    for high, pulse in zip(truth["range"], truth["pulse"], strict=True):
        vocal = rng.integers(0, CODES // 2, FRAMES) + high * CODES // 2
        band = rng.integers(2, CODES, FRAMES)
        if pulse < 2:
            band[::3] = pulse
        codes.append({"vocal": torch.tensor(vocal), "accompaniment": torch.tensor(band)})
    names = [f"{seed}-{index}" for index in range(count)]
    return Recordings(ids=names, songs=[str(index // 2) for index in range(count)], codes=codes, truth=truth)


@pytest.fixture(scope="module")
def sets() -> tuple[Recordings, Recordings, Recordings]:
    return make_set(40, 0), make_set(12, 1), make_set(24, 2)


def linear_probe(sets, label, classes, tracks=("vocal", "accompaniment")):
    vectors = {track: VECTORS[track] for track in tracks}
    features = [[pool_codes(codes, vectors) for codes in part.codes] for part in sets]
    return fit_linear(features, [part.truth[label] for part in sets[:2]], label, classes)


def linear_scores(sets, label, tracks=("vocal", "accompaniment")):
    found = linear_probe(sets, label, len(LABELS[label]), tracks)
    assert found.shape == (24, len(LABELS[label])) and found.min() >= 0 and found.max() <= 1
    return score_classes(sets[2].truth[label], found)


def test_the_linear_probe_finds_what_its_track_tells(sets):
    assert linear_scores(sets, "range")["accuracy"] > 0.9
    assert linear_scores(sets, "pulse")["macro_auc"] > 0.95
    assert linear_scores(sets, "range", ("accompaniment",))["accuracy"] < 0.8  # it is in the vocal only


def test_the_conformer_finds_both_kinds_of_label(sets):
    train, held_out, test = sets
    before = {track: table.clone() for track, table in VECTORS.items()}
    probe = train_conformer(train, held_out, VECTORS, LABELS, CONFIG)
    found = predict_conformer(probe, test)
    np.testing.assert_allclose(found["range"].sum(axis=1), 1, rtol=1e-5)
    assert score_classes(test.truth["range"], found["range"])["accuracy"] > 0.9
    assert score_classes(test.truth["pulse"], found["pulse"])["macro_auc"] > 0.9
    assert all(torch.equal(probe.get_buffer(f"vectors_{t}"), before[t]) for t in VECTORS)  # frozen


def test_the_same_seed_trains_the_same_probe(sets):
    once = dataclasses.replace(CONFIG, epochs=1)
    first, second = (train_conformer(sets[0], sets[1], VECTORS, LABELS, once) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_unknown_truth_is_neither_learned_nor_tested(sets):
    train, held_out, test = sets
    masked = train.truth["range"].copy()
    masked[::2] = UNKNOWN
    masked_train = dataclasses.replace(train, truth={**train.truth, "range": masked})
    assert linear_scores((masked_train, held_out, test), "range")["accuracy"] > 0.9
    hopeless = dataclasses.replace(train, truth={**train.truth, "range": np.full_like(masked, UNKNOWN)})
    probe = train_conformer(hopeless, held_out, VECTORS, LABELS, dataclasses.replace(CONFIG, epochs=1))
    assert all(torch.isfinite(parameter).all() for parameter in probe.parameters())
    with pytest.raises(DataError, match="known range"):
        linear_scores((hopeless, held_out, test), "range")


def test_a_class_that_training_never_has_is_never_told(sets):
    found = linear_probe(sets, "range", 3)
    assert found[:, 2].max() == 0 and found[:, 0].max() > 0.5
    only = dataclasses.replace(sets[0], truth={"range": np.zeros(40, int)})
    assert linear_probe((only, *sets[1:]), "range", 2)[:, 0].min() == 1


def test_the_probe_reads_every_track_and_every_length():
    probe = ConformerProbe(VECTORS, {"range": "ab"}, ConformerConfig(clip_frames=37)).eval()
    codes = {track: torch.randint(0, CODES, (3, 37)) for track in VECTORS}
    before = probe(codes)["range"]
    assert before.shape == (3, 2)
    for track in VECTORS:
        changed = {**codes, track: (codes[track] + 1) % CODES}
        assert not torch.allclose(probe(changed)["range"], before)


def test_clips_cover_their_recording():
    assert [clip_starts(frames, 20) for frames in (60, 50, 7)] == [[0, 20, 40], [0, 15, 30], [0]]
    codes = {"vocal": torch.arange(3)}
    clip = stack_clips([(codes, 0)], ["vocal"], ConformerConfig(clip_frames=7))
    assert clip["vocal"].tolist() == [[0, 1, 2, 0, 1, 2, 0]]


def test_scores_leave_out_what_cannot_be_tested():
    truth = np.array([0, 1, 0, UNKNOWN])
    scores = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]])
    # Class 2 has no positive: means over the other two.
    each = (([1, 0, 1], [0.9, 0.6, 0.2]), ([0, 1, 0], [0.1, 0.4, 0.8]))
    expected = np.mean([average_precision_score(*one) for one in each])
    found = {"accuracy": 1 / 3, "macro_auc": 0.5, "macro_ap": expected}
    assert score_classes(truth, scores) == pytest.approx(found)
    with pytest.raises(DataError, match="more test items"):
        score_classes(truth[:1], scores[:1])


def test_the_anchor_answers_the_most_frequent_class():
    found = score_classes(np.array([0, 1, 1, 1]), class_shares(np.array([0, 0, 1, UNKNOWN]), 2, 4))
    assert list(found.values()) == [0.25, 0.5, 0.5]


def test_mel_statistics_tell_noise_from_tones():
    times = torch.arange(96_000) / 48_000
    waves = {"tone": 0.1 * torch.sin(2 * torch.pi * 440 * times)[None], "noise": 0.1 * torch.randn(1, 96_000)}
    levels = {name: mel_frames(wave, LogMel(MEL_BANDS)).mean(dim=0) for name, wave in waves.items()}
    assert levels["tone"].argmax() < 20 and levels["noise"][64:].min() > levels["tone"][64:].max() + 1


def test_songs_are_held_out_whole():
    songs = [str(index // 3) for index in range(30)]
    kept, held_out = split_songs(songs, 0.2, seed=1)
    assert sorted(kept + held_out) == list(range(30)) and len(held_out) == 6
    assert not {songs[i] for i in kept} & {songs[i] for i in held_out}
    with pytest.raises(DataError, match="two songs"):
        split_songs(["one", "one"], 0.5, seed=0)


def test_labels_of_a_corpus(tiny_corpus):
    first = read_manifest(tiny_corpus / "train.jsonl")[0]
    train = [
        dataclasses.replace(first, id=str(n), tempo_bpm=60.0 + 10 * n, style=style, key=key, voice="alto")
        for n, (style, key) in enumerate(zip("aabbccdd", ["Eb:min", "C:maj"] * 4, strict=True))
    ]
    labels, borders = name_labels(train)
    assert set(labels) == {"style", "key", "tempo"}  # there is but one voice
    assert len(labels["key"]) == 24 and len(labels["tempo"]) == len(borders) + 1 == 4
    test = [
        dataclasses.replace(train[0], id="known", tempo_bpm=95.0),
        dataclasses.replace(train[0], id="spelled otherwise", key="D#:min"),
        dataclasses.replace(train[0], id="unknown", style="new", key=None, tempo_bpm=None),
        dataclasses.replace(train[0], id="without codes"),
    ]
    codes = {item.id: {"vocal": torch.zeros(5)} for item in test[:3]}
    found = label_items(test, codes, labels, borders)
    assert found.ids == [item.id for item in test[:3]]
    told = {label: labels[label][classes[0]] for label, classes in found.truth.items()}
    assert told == {"style": "a", "key": "Eb:min", "tempo": "95-112.5 bpm"}
    assert found.truth["key"][1] == found.truth["key"][0]
    assert [classes[2] for classes in found.truth.values()] == [UNKNOWN] * 3
