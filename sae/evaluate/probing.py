"""Sparse probing: can a few units tell a label that is known? (Gurnee et al. 2023, arXiv:2305.01610.)

Labels that need no network: the syntax class of the token, and the first letter of its text. Rows are divided by
context. On one half, for each class, the k units with the largest difference between the means of class and rest are
chosen and a logistic probe is fitted on them, class and rest weighed alike; the other half says how good it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sae.evaluate.interpretability import UnitFirings
from sae.philox import philox
from sae.progress import Progress, silent

N_UNITS = (1, 5)
"""Units a sparse probe may use."""
MIN_ROWS = 50
"""A class has at least so many rows in each half, and so has the rest."""
DENSE = "all neurons"
"""The ceiling: a probe on every dimension of the hook point."""
LOGISTIC_RIDGE = 1e-4
"""Penalty on squared coefficients of standardised units, beside a loss that is averaged over rows."""
DENSE_RIDGE = 1e-3
"""The same for the dense probe, as a share of the mean variance of its dimensions."""
MAX_STEPS = 50


class Task(NamedTuple):
    """Classes to tell from each other, one against the rest."""

    name: str
    classes: tuple[str, ...]
    label: np.ndarray
    """Class of every row; -1: the row is not part of the task. [n] int64"""


class SparseColumns:
    """Units that are mostly silent, column by column."""

    def __init__(self, firings: UnitFirings, n_rows: int, n_units: int) -> None:
        """firings: those in rows from `n_rows` on are left out."""
        kept = firings.row < n_rows
        order = np.argsort(firings.unit[kept], kind="stable")
        self.shape = (n_rows, n_units)
        self._unit = firings.unit[kept][order]
        self._row = firings.row[kept][order]
        self._value = firings.value[kept][order].astype(np.float64)

    def class_sums(self, label: np.ndarray, n_classes: int) -> np.ndarray:
        """Sum of every unit over the rows of every class; rows of label -1 count nowhere. [n_classes, n_units]"""
        place = (label[self._row] + 1) * self.shape[1] + self._unit
        sums = np.bincount(place, self._value, minlength=(n_classes + 1) * self.shape[1])
        return sums.reshape(n_classes + 1, -1)[1:]

    def columns(self, units: np.ndarray) -> np.ndarray:
        """Some units on all rows. [n, len(units)] float64"""
        found = np.zeros((self.shape[0], len(units)))
        for column, unit in enumerate(units):
            inside = slice(*np.searchsorted(self._unit, [unit, unit + 1]))
            found[self._row[inside], column] = self._value[inside]
        return found


class DenseColumns:
    """Units that have a value on every row."""

    def __init__(self, x: np.ndarray) -> None:
        """x: [n, n_units] float32"""
        self.x, self.shape = x, x.shape

    def class_sums(self, label: np.ndarray, n_classes: int) -> np.ndarray:
        """As SparseColumns.class_sums."""
        return np.stack([self.x[label == c].sum(axis=0, dtype=np.float64) for c in range(n_classes)])

    def columns(self, units: np.ndarray) -> np.ndarray:
        """As SparseColumns.columns."""
        return self.x[:, units].astype(np.float64)


Columns = SparseColumns | DenseColumns


@dataclass(frozen=True)
class Score:
    """One probe on the half it has not seen."""

    task: str
    name: str
    units_of: str
    k: int | None
    """None: all."""
    units: list[int]
    n_positive: int
    """Rows of the class that it was tested on."""
    n_rows: int
    accuracy: float
    balanced_accuracy: float
    """Mean of the accuracies on class and rest: .5 is chance."""
    f1: float


def split_contexts(context: np.ndarray, seed: int) -> np.ndarray:
    """Which rows the probes are fitted on: those of half of the contexts. [n] bool"""
    contexts, index = np.unique(context, return_inverse=True)
    fitted = np.zeros(len(contexts), bool)
    fitted[philox("probing", seed).permutation(len(contexts))[: len(contexts) // 2]] = True
    return fitted[index]


def letter_task(token: np.ndarray, texts: Mapping[int, bytes]) -> Task:
    """The first letter, without case, of tokens whose text, stripped, starts with an ASCII letter.

    Args:
        token: [n]
        texts: token id -> its bytes, for every id in `token`.
    """
    ids, index = np.unique(token, return_inverse=True)
    letters = np.full(len(ids), -1)
    for i, number in enumerate(ids.tolist()):
        text = texts[number].decode(errors="replace").strip()
        if text and text[0].isascii() and text[0].isalpha():
            letters[i] = ord(text[0].lower()) - ord("a")
    return Task("first letter", tuple("abcdefghijklmnopqrstuvwxyz"), letters[index])


def run_probes(
    task: Task, columns: Mapping[str, Columns], fitted: np.ndarray, *, progress: Progress = silent
) -> list[Score]:
    """Probe every class of a task with the best units of every kind, and with all neurons.

    Args:
        columns: kind of units -> their values. `neurons` is there and dense.
        fitted: which rows the probes are fitted on. [n] bool
    """
    n_classes = len(task.classes)
    train = np.where(fitted, task.label, -1)
    n_train = np.bincount(train[train >= 0], minlength=n_classes)
    n_test = np.bincount(task.label[~fitted & (task.label >= 0)], minlength=n_classes)
    classes = [
        c for c in range(n_classes) if all(min(int(n[c]), int(n.sum() - n[c])) >= MIN_ROWS for n in (n_train, n_test))
    ]
    scores = []
    in_train, in_test = train >= 0, ~fitted & (task.label >= 0)
    for done, (kind, values) in enumerate(columns.items()):
        progress(done, len(columns) + 1, "kinds of units", f"probes of the {task.name}")
        sums = values.class_sums(train, n_classes)
        for c in classes:
            difference = sums[c] / n_train[c] - (sums.sum(axis=0) - sums[c]) / (n_train.sum() - n_train[c])
            best = np.argsort(-np.abs(difference), kind="stable")[: max(N_UNITS)]
            x, positive = values.columns(best), task.label == c
            for k in N_UNITS:
                probe = fit_logistic(x[in_train, :k], positive[in_train])
                answer = x[in_test, :k] @ probe[1:] + probe[0] > 0
                units = best[:k].tolist()
                scores.append(_score(task, c, kind, min(k, len(best)), units, answer, positive[in_test]))
    neurons = columns["neurons"]
    assert isinstance(neurons, DenseColumns)
    for c, answer in zip(classes, _dense_answers(neurons.x, train, n_classes, classes, in_test), strict=True):
        scores.append(_score(task, c, DENSE, None, [], answer, task.label[in_test] == c))
    return scores


def fit_logistic(x: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Ridge-penalised logistic regression by Newton's method; both sides have the same total weight.

    Args:
        x: [n, k] float64
        positive: [n] bool, with both values

    Returns: intercept and coefficients. [1 + k]
    """
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1
    ones = np.ones((len(x), 1))
    z = np.concatenate([ones, (x - centre) / scale], axis=1)
    sign = np.where(positive, 1.0, -1.0)
    weight = np.where(positive, 0.5 / positive.sum(), 0.5 / (~positive).sum())
    penalty = np.full(z.shape[1], LOGISTIC_RIDGE)
    penalty[0] = 0

    def loss(w: np.ndarray) -> float:
        return float(weight @ np.logaddexp(0, -sign * (z @ w)) + (penalty * w) @ w / 2)

    w = np.zeros(z.shape[1])
    current = loss(w)
    for _ in range(MAX_STEPS):
        wrong = 1 / (1 + np.exp(np.clip(sign * (z @ w), -500, 500)))
        gradient = penalty * w - z.T @ (weight * sign * wrong)
        hessian = (z.T * (weight * wrong * (1 - wrong))) @ z + np.diag(penalty)
        hessian[0, 0] += 1e-12  # saturated rows leave the intercept without curvature
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while (proposed := loss(w - size * step)) > current and size > 1e-6:
            size /= 2
        if not current - proposed > 1e-10:
            break
        w, current = w - size * step, proposed
    coefficients = w[1:] / scale
    return np.concatenate([[w[0] - coefficients @ centre], coefficients])


def _dense_answers(
    x: np.ndarray, train: np.ndarray, n_classes: int, classes: list[int], in_test: np.ndarray
) -> list[np.ndarray]:
    """What a least-squares probe on all dimensions says of the test rows, class by class.

    Targets are +1 and -1, both sides have the same total weight. The moments of the rows of each class are summed
    once, so a class costs one solution of d_in equations.
    """
    d_in = x.shape[1]
    counts = np.bincount(train[train >= 0], minlength=n_classes)
    total = np.zeros((d_in + 1, d_in + 1))
    moments = {}
    for c in np.flatnonzero(counts).tolist():
        rows = np.concatenate([np.ones((counts[c], 1), np.float32), x[train == c]], axis=1).astype(np.float64)
        product = rows.T @ rows
        total += product
        if c in classes:
            moments[c] = product
    tested = x[in_test]
    answers = []
    for c in classes:
        own, rest = 0.5 / counts[c], 0.5 / (counts.sum() - counts[c])
        matrix = own * moments[c] + rest * (total - moments[c])
        target = own * moments[c][0] - rest * (total[0] - moments[c][0])
        variance = matrix.diagonal()[1:] - matrix[0, 1:] ** 2
        matrix[np.arange(1, d_in + 1), np.arange(1, d_in + 1)] += max(DENSE_RIDGE * variance.mean(), 1e-12)
        probe = np.linalg.solve(matrix, target).astype(np.float32)
        answers.append(tested @ probe[1:] + probe[0] > 0)
    return answers


def _score(
    task: Task, c: int, kind: str, k: int | None, units: list[int], answer: np.ndarray, truth: np.ndarray
) -> Score:
    n_positive, n_negative = int(truth.sum()), int((~truth).sum())
    hits, rejections = int((answer & truth).sum()), int((~answer & ~truth).sum())
    return Score(
        task=task.name,
        name=task.classes[c],
        units_of=kind,
        k=k,
        units=units,
        n_positive=n_positive,
        n_rows=len(truth),
        accuracy=(hits + rejections) / len(truth),
        balanced_accuracy=(hits / n_positive + rejections / n_negative) / 2,
        f1=2 * hits / (n_positive + int(answer.sum())),
    )


def scores_table(scores: list[Score]) -> pa.Table:
    """probing.parquet: one row per class, kind of units and k."""
    schema = pa.schema(
        {
            **{name: pa.string() for name in ("task", "name", "units_of")},
            "k": pa.int32(),
            "units": pa.list_(pa.int32()),
            **{name: pa.int64() for name in ("n_positive", "n_rows")},
            **{name: pa.float64() for name in ("accuracy", "balanced_accuracy", "f1")},
        }
    )
    return pa.Table.from_pylist([vars(score) for score in scores], schema=schema)


def summarize(scores: list[Score]) -> list[dict[str, Any]]:
    """Means over the classes of a task, for every kind of units and k, in the order in which they were made."""
    groups: dict[tuple[str, str, int | None], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.task, score.units_of, score.k), []).append(score)
    return [
        {
            "task": task,
            "units_of": kind,
            "k": k,
            "n_classes": len(group),
            **{
                name: float(np.mean([getattr(score, name) for score in group]))
                for name in ("accuracy", "balanced_accuracy", "f1")
            },
        }
        for (task, kind, k), group in groups.items()
    ]
