"""Metrics: parity with recorded values, hand-computed cases, edges."""

import pathlib
import warnings

import numpy as np
import pytest

from experiments.parity.goldens import metrics as golden
from mmjax import metrics, types

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def recorded():
  return dict(np.load(DATA / "metrics.npz"))


def test_parity_of_every_recorded_value(recorded):
  compared = 0
  for group, name, ours, theirs in golden.compare(recorded):
    np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=0, err_msg=f"{group} {name}")
    compared += 1
  inputs = sum(key.endswith(("/pred", "/label")) for key in recorded)
  assert compared == len(recorded) - inputs - 1  # all but the inputs and the notes


def test_comparison_of_metrics_notices_a_wrong_value(recorded):
  for key in ("mosi/Corr", "lnln_mosei/Non0_F1_score", "lnln_sims/MAE"):
    wrong = {**recorded, key: recorded[key] + 1e-3}
    assert any(not np.isclose(o, t, rtol=1e-5) for *_, o, t in golden.compare(wrong))


def test_sentiment_by_hand():
  label = [-3.0, -0.5, 0.0, 0.0, 2.5, 1.0]
  prediction = [-5.0, 0.1, -0.2, 0.3, 2.4, 0.0]
  found = metrics.sentiment(prediction, label)
  assert found["mae"] == pytest.approx((2 + 0.6 + 0.2 + 0.3 + 0.1 + 1) / 6)
  assert found["corr"] == pytest.approx(np.corrcoef(prediction, label)[0, 1])
  assert found["acc2_has0"] == pytest.approx(4 / 6)  # -0.5 and the first 0 are wrong
  assert found["acc2_non0"] == pytest.approx(2 / 4)  # a prediction of 0 is not positive
  # negatives: precision 1/2, recall 1/2; positives: the same
  assert found["f1_non0"] == pytest.approx(0.5)
  # half to even: 2.5 -> 2, and -0.5 -> -0, which equals the prediction's 0
  assert found["acc7"] == pytest.approx(5 / 6)
  assert found["acc5"] == pytest.approx(5 / 6)
  assert found["acc3"] == pytest.approx(5 / 6)


def test_f1_takes_the_truth_first():
  label, prediction = [1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, -1.0]
  found = metrics.sentiment(prediction, label, swapped=True)
  # positive: precision 1, recall 1/3, F1 1/2; negative: precision 1/3, recall 1, F1 1/2
  assert found["f1_has0"] == pytest.approx(0.5)
  label, prediction = [1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]
  found = metrics.sentiment(prediction, label, swapped=True)
  assert found["f1_has0"] == pytest.approx(3 / 4 * 6 / 7)
  assert found["f1_has0_swapped"] == pytest.approx(6 / 7)  # hides the class never predicted
  assert metrics.sims(prediction, label, swapped=True)["f1_swapped"] == pytest.approx(6 / 7)
  assert "f1_has0_swapped" not in metrics.sentiment(prediction, label)


def test_sims_bins_end_inclusively_in_float32():
  at = np.float32([-1, -0.7, -0.69, -0.1, -0.09, 0, 0.1, 0.11, 0.7, 0.71, 1])
  for classes, bins in {
    2: [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    3: [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2],
    5: [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4],
  }.items():
    centre = {2: [-1, 1], 3: [-1, 0, 1], 5: [-1, -0.5, 0, 0.5, 1]}[classes]
    for i, own in enumerate(bins):
      for other, middle in enumerate(centre):
        found = metrics.sims(at[i : i + 1], [middle])[f"acc{classes}"]
        assert found == (own == other), (classes, at[i], middle)
  assert metrics.sims([9.0, -9.0], [1.0, -1.0])["mae"] == 0  # clipped


def test_classification_by_hand():
  label = np.array([0, 0, 0, 1, 1, 2])
  chosen = np.array([0, 0, 1, 1, 2, 2])
  logits = np.eye(4)[chosen]  # class 3 never occurs
  found = metrics.classification(logits, label)
  f1 = [2 * 2 / 5, 2 * 1 / 4, 2 * 1 / 3, 0]
  assert found["acc"] == pytest.approx(4 / 6)
  assert found["uar"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
  assert found["f1"] == pytest.approx((3 * f1[0] + 2 * f1[1] + f1[2]) / 6)
  assert [found[f"f1_{c}"] for c in range(4)] == pytest.approx(f1)
  expected = [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  np.testing.assert_array_equal(metrics.confusion(logits, label), expected)


def test_classification_agrees_with_scikit_learn():
  from sklearn import metrics as sklearn

  rng = np.random.default_rng(0)
  logits, label = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
  found, chosen = metrics.classification(logits, label), logits.argmax(1)
  assert found["uar"] == pytest.approx(sklearn.balanced_accuracy_score(label, chosen))
  assert found["f1"] == pytest.approx(sklearn.f1_score(label, chosen, average="weighted"))
  per_class = sklearn.f1_score(label, chosen, average=None)
  assert [found[f"f1_{c}"] for c in range(4)] == pytest.approx(list(per_class))


def test_edges_give_no_warning():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for scale in (metrics.sentiment, metrics.sims):
      assert scale([0.1] * 4, [1.0, -1.0, 0.5, 0.0])["corr"] == 0
      assert scale([0.1, 0.2], [1.0, 1.0])["corr"] == 0
    zeros = metrics.sentiment([0.1, 0.2], [0.0, 0.0])
    assert np.isnan(zeros["acc2_non0"]) and np.isnan(zeros["f1_non0"])
    assert metrics.classification([[1.0, 0.0]] * 3, [1, 1, 1])["f1"] == 0


def test_predictions_of_any_shape_and_all_values_are_plain_floats():
  rng = np.random.default_rng(0)
  p, y = rng.normal(size=(8, 1)), rng.normal(size=(8, 1))
  assert metrics.sentiment(p, y) == metrics.sentiment(p[:, 0], y[:, 0])  # and no [8, 8] broadcast
  for found in (
    metrics.sentiment(p, y),
    metrics.sims(p, y),
    metrics.classification(np.eye(3)[[0, 1]], [0, 1]),
  ):
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: metrics.sentiment([1.0, 2.0], [1.0]), "N predictions"),
    (lambda: metrics.sims([], []), "N predictions"),
    (lambda: metrics.classification([1.0, 2.0], [0, 1]), "logits"),
    (lambda: metrics.classification(np.eye(3), [0, 1, 3]), "from 0 to 3"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_task_picks_its_metrics():
  shape = types.ModalitySpec(1, 1)
  spec = types.Spec(shape, shape, shape, 10)
  assert metrics.for_task(spec) is metrics.sentiment
  assert metrics.for_task(spec._replace(label_range=(-1.0, 1.0))) is metrics.sims
  assert metrics.for_task(spec._replace(num_classes=4)) is metrics.classification
  for name, expected in {
    "mosi": metrics.sentiment,
    "MOSEI": metrics.sentiment,
    "SIMSv2": metrics.sims,
    "iemocap": metrics.classification,
  }.items():
    assert metrics.for_task(name) is expected
  assert "acc7" in metrics.compute("my_data", [[0.5], [0.1]], [[1.0], [0.0]])
  assert "uar" in metrics.compute("my_data", [[0.5, 0.1], [0.1, 0.5]], [1, 0])


def test_every_metric_has_a_direction():
  found = {
    *metrics.sentiment([0.0], [0.0]),
    *metrics.sims([0.0], [0.0]),
    *metrics.classification([[1.0, 0.0]], [0]),
  }
  assert {name for name in found if not name.startswith("f1_")} <= set(metrics.METRICS)
  assert frozenset({"mae", "loss"}) == metrics.LOWER_IS_BETTER
