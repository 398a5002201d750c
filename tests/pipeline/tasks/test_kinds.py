"""Losses and scores of each kind of task against plain formulas, with rows that have no label."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from cache.labelling import LABEL_DTYPES
from pipeline.records import TrialDone, rank
from pipeline.tasks import KINDS, Task, kind_of, task_from
from pipeline.tasks.classes import ClassTask
from pipeline.tasks.multilabel import MultilabelTask, average_precision, mean_average_precision
from pipeline.tasks.regression import RegressionTask

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")
CLASS = ClassTask(name="colour", classes=("a", "b", "c", "d", "e", "f"))
MULTILABEL = MultilabelTask(name="marks", classes=("x", "y", "z"))
AGE = RegressionTask(name="age", centre=40.0, scale=10.0)
LABELS = {
    "colour": torch.tensor([3, -1, 0, 5]),
    "marks": torch.tensor([[1, 0, 0], [-1, -1, -1], [0, 1, 1], [0, 0, 0]], dtype=torch.int8),
    "age": torch.tensor([35.0, math.nan, 60.0, 41.0]),
}
KNOWN = [0, 2, 3]


def outputs(task: Task, members: int = 2) -> torch.Tensor:
    return torch.randn(members, 4, task.outputs, generator=torch.Generator().manual_seed(1))


def reference(task: Task, output: torch.Tensor, label: torch.Tensor, smoothing: float) -> float:
    """One row's loss, by torch's own functions where they have it."""
    if task.kind == "class":
        found = functional.cross_entropy(output, label, label_smoothing=smoothing)
    elif task.kind == "multilabel":
        truth = label.float() * (1 - smoothing) + smoothing / 2
        found = functional.binary_cross_entropy_with_logits(output, truth)
    else:
        found = (output[0] - (label - task.centre) / task.scale) ** 2
    return float(found)


@pytest.mark.parametrize("task", [CLASS, MULTILABEL, AGE], ids=lambda task: task.kind)
class TestEveryKind:
    def test_loss_is_the_mean_over_labelled_rows(self, task: Task) -> None:
        smoothing = (0.0, 0.0) if task.kind == "regression" else (0.0, 0.2)
        found = task.loss(outputs(task), LABELS[task.name], torch.tensor(smoothing))
        for member, amount in enumerate(smoothing):
            rows = [
                reference(task, outputs(task)[member, i], LABELS[task.name][i], amount)
                for i in KNOWN
            ]
            assert float(found[member]) == pytest.approx(sum(rows) / len(rows), rel=1e-5)

    def test_unlabelled_rows_send_no_gradient(self, task: Task) -> None:
        given = outputs(task).requires_grad_()
        task.loss(given, LABELS[task.name], torch.zeros(2)).sum().backward()
        assert given.grad is not None and given.grad.isfinite().all()
        assert not given.grad[:, 1].any() and given.grad[:, 0].any()

    def test_a_batch_without_a_label_has_no_loss(self, task: Task) -> None:
        labels = LABELS[task.name][1:2]
        assert float(task.loss(outputs(task)[:, 1:2], labels, torch.zeros(2)).sum()) == 0.0

    def test_a_tally_over_batches_is_that_of_all_rows(self, task: Task) -> None:
        whole, parts = task.tally(2, CPU), task.tally(2, CPU)
        whole.add(outputs(task), LABELS[task.name])
        for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
            parts.add(outputs(task)[:, rows], LABELS[task.name][rows])
        for one, other in zip(whole.scores(), parts.scores(), strict=True):
            assert one.n == other.n == 3
            assert one.values == pytest.approx(other.values)
            assert one.loss == pytest.approx(other.loss)
            assert next(iter(one.values)) == task.metric and one.score == one.values[task.metric]

    def test_cells_are_read_as_they_were_written(self, task: Task) -> None:
        labels = LABELS[task.name].numpy()
        cells = [task.written(label) for label in labels]
        classes, values = task.parse(cells, task.classes or None, lambda row: f"row {row}")
        assert classes == task.classes and [not cell for cell in cells] == [0, 1, 0, 0]
        np.testing.assert_array_equal(values, labels)

    def test_labels_keep_their_classes_among_others(self, task: Task) -> None:
        labels = LABELS[task.name].numpy()
        wider = tuple(sorted({"new", *task.classes}, reverse=True)) if task.classes else ()
        place = [wider.index(name) for name in task.classes]
        moved = task.renumbered(labels, place, wider)
        there = dataclasses.replace(task, classes=wider)
        cells = [{*there.written(label).split(";")} for label in moved]
        assert cells == [{*task.written(label).split(";")} for label in labels]
        assert moved is not labels and moved.dtype == labels.dtype

    def test_round_trip(self, task: Task) -> None:
        assert task_from(task.to_dict()) == task
        assert list(task.to_dict()) == ["name", "kind", "classes", "centre", "scale"]


def test_every_kind_goes_by_its_name_and_has_columns_and_scores_of_its_own() -> None:
    assert {type(task) for task in (CLASS, MULTILABEL, AGE)} == set(KINDS.values())
    assert [kind.kind for kind in KINDS.values()] == list(KINDS)
    assert KINDS.keys() <= LABEL_DTYPES.keys()
    assert len({kind.column for kind in KINDS.values()}) == len(KINDS)
    for kind in KINDS.values():
        assert {kind_of(score) for score in kind.scores} == {kind}
    assert kind_of("speed") is None


def test_perfect_outputs_score_one() -> None:
    perfect = {
        "colour": functional.one_hot(LABELS["colour"].clamp_min(0), 6).float(),
        "marks": LABELS["marks"].float(),
        "age": ((LABELS["age"] - 40) / 10)[:, None].nan_to_num(),
    }
    for task in (CLASS, MULTILABEL, AGE):
        tally = task.tally(1, CPU)
        tally.add(perfect[task.name][None], LABELS[task.name])
        assert tally.scores()[0].score == pytest.approx(1.0)


def test_regression_scores_are_in_the_targets_unit() -> None:
    tally = AGE.tally(1, CPU)
    tally.add(torch.zeros(1, 4, 1), LABELS["age"])  # predicts 40 everywhere
    known = np.array([35.0, 60.0, 41.0])
    values = tally.scores()[0].values
    assert values["mae"] == pytest.approx(np.abs(known - 40).mean())
    r2 = 1 - ((known - 40) ** 2).sum() / ((known - known.mean()) ** 2).sum()
    assert values["r2"] == pytest.approx(r2)


def test_one_ranking_for_members_and_trials() -> None:
    """By score, then loss; without a score later; stopped early last, however good it looked."""
    best_first = [
        (0.9, 0.3, False), (0.9, 0.4, False), (0.8, 0.1, False), (None, None, False),
        (float("nan"), float("nan"), False), (0.95, 0.2, True), (None, None, True),
    ]  # fmt: skip
    keys = [rank(score, loss, stopped=stopped) for score, loss, stopped in best_first]
    assert keys == sorted(keys)
    nothing = rank(None, None, stopped=False)
    assert rank(float("nan"), float("inf"), stopped=False) == nothing

    def trial(state: str, score: float) -> TrialDone:
        return TrialDone(number=0, state=state, member="m0", method="last", settings={},
                         score=score, loss=0.1, reason=None)  # fmt: skip

    assert trial("done", 0.5).rank < trial("pruned", 0.9).rank


def test_top5_with_many_classes() -> None:
    tally = CLASS.tally(1, CPU)
    tally.add(torch.arange(6.0).expand(1, 2, 6), torch.tensor([0, 1]))
    assert tally.scores()[0].values == {"top1": 0.0, "top5": 0.5}


def plain_average_precision(scores: list[float], truth: list[int]) -> float:
    """Sum over thresholds of precision times the recall it adds, from the definition."""
    found, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        recall = sum(chosen) / sum(truth)
        found += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return found


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=12))
def test_average_precision_equals_its_definition(rows: list[tuple[int, int]]) -> None:
    scores, truth = [float(s) for s, _ in rows], [t for _, t in rows]
    found = average_precision(np.array(scores), np.array(truth))
    if not any(truth):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(plain_average_precision(scores, truth))


def test_classes_that_never_occur_do_not_count() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert mean_average_precision(scores, np.array([[1, 0], [0, 0]])) == 1.0
    assert mean_average_precision(scores, np.zeros((2, 2))) == 0.0
