"""How well scores find tags: accuracy, average precision and area under the ROC curve."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from duotok.tokenizer.common.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TagScores:
    """Scores of one label over the recordings for which its truth is known."""

    accuracy: float | None  # share of recordings whose likeliest class is right; None for tags
    average_precision: float  # mean over classes (P 4.3, macro)
    roc_auc: float  # mean over classes
    by_class: dict[int, tuple[float, float]]  # class -> average precision, ROC-AUC; only those that count
    recordings: int

    def figures(self, name: str) -> dict[str, float]:
        """Flat figures, `name` leading."""
        found = {f"{name}_macro_ap": self.average_precision, f"{name}_macro_auc": self.roc_auc}
        return found if self.accuracy is None else {f"{name}_accuracy": self.accuracy, **found}


def score_tags(truth: np.ndarray, scores: np.ndarray, *, exclusive: bool) -> TagScores:
    """Compare scores [recordings, classes] with truth [recordings, classes] of 0 and 1.

    Rows of truth that are NaN are not known and do not count; neither do classes without both a positive and
    a negative recording. exclusive: every recording has exactly one class.
    """
    known = ~np.isnan(truth).any(axis=1)
    truth, scores = truth[known], scores[known]
    both = [index for index in range(truth.shape[1]) if 0 < truth[:, index].sum() < len(truth)]
    if not both:
        raise DataError("no class has both a positive and a negative test recording; use more test items")
    by_class = {
        index: (
            float(average_precision_score(truth[:, index], scores[:, index])),
            float(roc_auc_score(truth[:, index], scores[:, index])),
        )
        for index in both
    }
    accuracy = float((truth.argmax(axis=1) == scores.argmax(axis=1)).mean()) if exclusive else None
    return TagScores(
        accuracy=accuracy,
        average_precision=float(np.mean([precision for precision, _ in by_class.values()])),
        roc_auc=float(np.mean([area for _, area in by_class.values()])),
        by_class=by_class,
        recordings=len(truth),
    )


def score_majority(train: np.ndarray, test: np.ndarray, *, exclusive: bool) -> TagScores:
    """Scores of always answering the classes' shares of the training recordings: the anchor without input."""
    shares = np.nanmean(train, axis=0)
    return score_tags(test, np.tile(shares, (len(test), 1)), exclusive=exclusive)
