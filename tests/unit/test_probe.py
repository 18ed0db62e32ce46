"""Probes on codes: they find what is in the codes, and nothing where there is nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.research.probe import label_items, name_labels, normalize_key, split_songs
from duotok.recipes.research.probe_training import (
    ConformerConfig,
    ConformerProbe,
    Label,
    ProbeSet,
    ProbeTraining,
    clip_starts,
    cut_clip,
    fit_linear,
    mean_by_owner,
    pool_codes,
    predict_conformer,
    score_classes,
    train_conformer,
)
from duotok.tokenizer.common.errors import DataError

CODES, FRAMES = 16, 60
VECTORS = {
    track: torch.randn(CODES, 4, generator=torch.Generator().manual_seed(seed))
    for seed, track in enumerate(("vocal", "accompaniment"))
}
LABELS = [
    Label(name="range", classes=("low", "high")),  # which half of the codes the vocal uses
    Label(name="pulse", classes=("even", "odd", "none")),  # codes 0 and 1 of the band
]
TRAINING = ProbeTraining(clip_frames=20, epochs=6, batch=8, learning_rate=5e-3)
TINY = ConformerConfig(dim=16, heads=2, blocks=1, kernel=5, stride=2, dropout=0.0)


def make_set(count: int, seed: int) -> ProbeSet:
    rng = np.random.default_rng(seed)
    codes, truth = [], {label.name: np.zeros((count, len(label.classes)), np.float32) for label in LABELS}
    for index in range(count):
        high, pulse = int(rng.integers(2)), int(rng.integers(3))
        vocal = rng.integers(0, CODES // 2, FRAMES) + high * CODES // 2
        band = rng.integers(2, CODES, FRAMES)
        if pulse < 2:
            band[::3] = pulse
        codes.append({"vocal": torch.tensor(vocal), "accompaniment": torch.tensor(band)})
        truth["range"][index, high] = truth["pulse"][index, pulse] = 1
    return ProbeSet(
        ids=tuple(f"{seed}-{index}" for index in range(count)),
        songs=tuple(str(index // 2) for index in range(count)),
        codes=tuple(codes),
        truth=truth,
    )


@pytest.fixture(scope="module")
def sets() -> tuple[ProbeSet, ProbeSet, ProbeSet]:
    return make_set(40, 0), make_set(12, 1), make_set(24, 2)


def linear_scores(sets, label, tracks=("vocal", "accompaniment")):
    parts = [pool_codes(part, {track: VECTORS[track] for track in tracks}, 20) for part in sets]
    truth = [part.truth[label.name] for part in sets]
    found = fit_linear((parts[0], truth[0]), (parts[1], truth[1]), parts[2], label)
    assert found.shape == truth[2].shape and found.min() >= 0 and found.max() <= 1
    return score_classes(truth[2], found)


def test_the_linear_probe_finds_what_its_track_tells(sets):
    assert linear_scores(sets, LABELS[0]).accuracy > 0.9
    assert linear_scores(sets, LABELS[1]).roc_auc > 0.95
    assert linear_scores(sets, LABELS[0], ("accompaniment",)).accuracy < 0.8  # it is in the vocal only


def test_the_conformer_finds_both_kinds_of_label(sets):
    train, held_out, test = sets
    before = {track: table.clone() for track, table in VECTORS.items()}
    probe = train_conformer(train, held_out, VECTORS, LABELS, TRAINING, TINY)
    found = predict_conformer(probe, test, LABELS, TRAINING)
    np.testing.assert_allclose(found["range"].sum(axis=1), 1, rtol=1e-5)
    assert score_classes(test.truth["range"], found["range"]).accuracy > 0.9
    assert score_classes(test.truth["pulse"], found["pulse"]).roc_auc > 0.9
    assert all(torch.equal(probe.get_buffer(f"vectors_{t}"), before[t]) for t in VECTORS)  # frozen


def test_the_same_seed_trains_the_same_probe(sets):
    once = dataclasses.replace(TRAINING, epochs=1)
    first, second = (train_conformer(sets[0], sets[1], VECTORS, LABELS, once, TINY) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_unknown_truth_is_neither_learned_nor_tested(sets):
    train, held_out, test = sets
    masked = train.truth["range"].copy()
    masked[::2] = np.nan
    masked_train = dataclasses.replace(train, truth={**train.truth, "range": masked})
    assert linear_scores((masked_train, held_out, test), LABELS[0]).accuracy > 0.9
    probe = train_conformer(masked_train, held_out, VECTORS, LABELS, TRAINING, TINY)
    assert all(torch.isfinite(parameter).all() for parameter in probe.parameters())
    hopeless = dataclasses.replace(train, truth={"range": np.full_like(masked, np.nan)})
    with pytest.raises(DataError, match="known range"):
        linear_scores((hopeless, held_out, test), LABELS[0])


def test_a_class_that_training_never_has_is_never_told(sets):
    truth = [np.pad(part.truth["range"], ((0, 0), (0, 1))) for part in sets]
    parts = [pool_codes(part, VECTORS, 20) for part in sets]
    label = Label(name="range", classes=("low", "high", "never"))
    found = fit_linear((parts[0], truth[0]), (parts[1], truth[1]), parts[2], label)
    assert found[:, 2].max() == 0 and found[:, 0].max() > 0.5


def test_the_probe_reads_every_track_and_every_length():
    probe = ConformerProbe(VECTORS, {"range": 2}, ConformerConfig()).eval()
    codes = {track: torch.randint(0, CODES, (3, 37)) for track in VECTORS}
    before = probe(codes)["range"]
    assert before.shape == (3, 2)
    for track in VECTORS:
        changed = {**codes, track: (codes[track] + 1) % CODES}
        assert not torch.allclose(probe(changed)["range"], before)


def test_clips_cover_their_recording():
    assert clip_starts(60, 20) == [0, 20, 40]
    assert clip_starts(50, 20) == [0, 15, 30]
    assert clip_starts(7, 20) == [0]
    assert cut_clip(torch.arange(3), 0, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert mean_by_owner(np.array([[1.0], [3.0], [5.0]]), np.array([0, 0, 1])).tolist() == [[2], [5]]


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
    by_name = {label.name: label for label in labels}
    assert set(by_name) == {"style", "key", "tempo"}  # there is but one voice
    assert len(by_name["key"].classes) == 24 and len(by_name["tempo"].classes) == len(borders) + 1 == 4
    test = [
        dataclasses.replace(train[0], id="known", tempo_bpm=95.0),
        dataclasses.replace(train[0], id="unknown", style="new", key=None, tempo_bpm=None),
        dataclasses.replace(train[0], id="without codes"),
    ]
    codes = {name: {"vocal": torch.zeros(5)} for name in ("known", "unknown")}
    found = label_items(test, codes, labels, borders)
    assert found.ids == ("known", "unknown")
    told = {name: by_name[name].classes[int(rows[0].argmax())] for name, rows in found.truth.items()}
    assert told == {"style": "a", "key": "Eb:min", "tempo": "95-112.5 bpm"}
    assert all(np.isnan(rows[1]).all() for rows in found.truth.values())
    assert (
        normalize_key("Bb:maj") == normalize_key("A#:maj") == "Bb:maj" and normalize_key("F#:min") == "F#:min"
    )
