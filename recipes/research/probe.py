"""What frozen codes say about the music: probes on code vectors only, next to two anchors (P B.2).

For every label of the corpus (style, key, tempo class, voice): a linear probe on pooled code vectors and a
small Conformer on their sequence, learned from training songs, tested on test songs; the same linear probe on
statistics of the log-mel spectrogram; and the shares of the training songs, which need no input at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tqdm import tqdm

from duotok.recipes.research.diagnosis import Diagnosis
from duotok.recipes.research.probe_data import (
    CLIP_SECONDS,
    INPUTS,
    Label,
    ProbeScores,
    ProbeSet,
    label_items,
    name_labels,
    score_classes,
    score_majority,
    split_songs,
)
from duotok.recipes.research.probe_training import (
    ClipFeatures,
    ProbeTraining,
    fit_linear,
    join_mel,
    measure_mel,
    pool_codes,
    predict_conformer,
    train_conformer,
)
from duotok.tokenizer.common.errors import DataError

MAJORITY = ("none", "majority")
METHODS = ("mel_linear", "codes_linear", "codes_conformer")
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Scores by label, then by (input, method); ("none", "majority") is the anchor without input."""

    labels: tuple[Label, ...]
    scores: Mapping[str, Mapping[tuple[str, str], ProbeScores]]
    train_recordings: int
    test_recordings: int

    def figures(self) -> dict[str, float]:
        """Flat figures: label, input, method, measure."""
        found: dict[str, float] = {
            "train_recordings": self.train_recordings,
            "test_recordings": self.test_recordings,
        }
        for label, by_method in self.scores.items():
            for (seen, method), scores in by_method.items():
                found |= scores.figures(f"{label}_{method}" if seen == "none" else f"{label}_{seen}_{method}")
            found[f"{label}_test_recordings"] = by_method[MAJORITY].recordings
        return found


def measure_probe(diagnosis: Diagnosis) -> ProbeResult:
    """Train and test all probes on the corpus."""
    settings = diagnosis.settings
    clip_frames = round(CLIP_SECONDS * diagnosis.tokenizer.frame_rate_hz)
    labels, borders = name_labels(diagnosis.train_items)
    learning = label_items(diagnosis.train_items, diagnosis.train_codes(), labels, borders)
    test = label_items(diagnosis.test_items, diagnosis.test_codes(), labels, borders)
    kept, held_out = split_songs(learning.songs, _HELD_OUT_SHARE, settings.seed)
    sets = (learning.take(kept), learning.take(held_out), test)
    # A label counts where the test recordings can tell one class of it from another.
    labels = [label for label in labels if _is_testable(test, label)]
    if not labels:
        raise DataError(f"the test items in {settings.corpus} differ in nothing that training items have")
    training = ProbeTraining(
        clip_frames=clip_frames, epochs=settings.epochs, device=settings.device, seed=settings.seed
    )
    scores: dict[str, dict[tuple[str, str], ProbeScores]] = {
        label.name: {MAJORITY: score_majority(learning.truth[label.name], test.truth[label.name])}
        for label in labels
    }
    mel = None
    if settings.mel:
        readable = {*learning.ids, *test.ids}
        items = [i for i in (*diagnosis.train_items, *diagnosis.test_items) if i.id in readable]
        mel = measure_mel(items, clip_frames)
    for seen, tracks in INPUTS.items():
        vectors = {track: diagnosis.vectors[track] for track in tracks}
        features = {"codes_linear": [pool_codes(part, vectors, clip_frames) for part in sets]}
        if mel is not None:
            features["mel_linear"] = [join_mel(part, mel, tracks) for part in sets]
        for method, parts in features.items():
            for label in tqdm(labels, desc=f"{method}, {seen}", disable=None):
                scores[label.name][seen, method] = _score_linear(sets, parts, label)
        probe = train_conformer(sets[0], sets[1], vectors, labels, training)
        found = predict_conformer(probe, test, labels, training)
        for label in labels:
            scores[label.name][seen, "codes_conformer"] = score_classes(
                test.truth[label.name], found[label.name]
            )
    return ProbeResult(
        labels=tuple(labels), scores=scores, train_recordings=len(learning), test_recordings=len(test)
    )


def _score_linear(sets: tuple[ProbeSet, ...], parts: list[ClipFeatures], label: Label) -> ProbeScores:
    train, held_out, test = (
        (features, part.truth[label.name]) for features, part in zip(parts, sets, strict=True)
    )
    found = fit_linear(train, held_out, test[0], label)
    return score_classes(test[1], found)


def _is_testable(test: ProbeSet, label: Label) -> bool:
    truth = test.truth[label.name]
    known = truth[(truth == truth).all(axis=1)]
    return len(known) > 0 and bool(((known.sum(axis=0) > 0) & (known.sum(axis=0) < len(known))).any())
