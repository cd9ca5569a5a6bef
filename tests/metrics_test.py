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
  for name in ("has0", "non0"):  # it hides the class never predicted
    assert found[f"f1_{name}_swapped"] == pytest.approx(6 / 7)
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


def test_binary_problems_by_hand():
  """Two problems; answers 0: neither, 1: the first, 2: the second, 3: both."""
  label = [1, 2, 3, 0, 1]
  found = metrics.binary(np.eye(4)[[1, 2, 1, 2, 1]], label, ("happy", "sad"))
  # happy: all right; sad: yes of 2 and 3, said of the second and the fourth
  assert found["f1_happy"] == 1
  no, yes = 2 * 2 / (3 + 3), 2 * 1 / (2 + 2)
  assert found["f1_sad"] == pytest.approx((3 * no + 2 * yes) / 5)
  assert found["f1"] == pytest.approx((1 + found["f1_sad"]) / 2)
  assert found["acc"] == pytest.approx((5 + 3) / 10)
  spec = SPEC._replace(num_classes=4, problems=("happy", "sad"))
  assert metrics.compute(spec, np.eye(4)[[1, 2, 1, 2, 1]], label, swapped=True) == found
  assert set(metrics.names(spec)) == set(found) and metrics.scale_of(spec) == "binary"
  assert metrics.names(spec) == ("acc", "f1", "f1_happy", "f1_sad")
  assert "binary" in metrics.info("f1_sad").needs
  with pytest.raises(ValueError, match="4 logits"):
    metrics.binary(np.eye(4)[[0]], [4], ("happy", "sad"))


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


SHAPE = types.ModalitySpec(1, 1)
SPEC = types.Spec(SHAPE, SHAPE, SHAPE, 10)
SPECS = {
  "sentiment": SPEC,
  "sims": SPEC._replace(label_range=(-1.0, 1.0)),
  "regression": SPEC._replace(label_range=(1.0, 7.0)),
  "classification": SPEC._replace(num_classes=3),
}


@pytest.mark.parametrize(
  ("label_range", "scale"),
  [
    ((-3.0, 3.0), "sentiment"),
    ((-2.8, 3.0), "sentiment"),  # what occurs of MOSI's scale under a name of one's own
    ((-0.4, 3.00001), "sentiment"),
    ((-1.0, 1.0), "sims"),
    ((-1.0000001, 0.8), "sims"),
    ((-1.0, 1.2), "sentiment"),
    ((-3.0, 1.0), "sentiment"),
    ((1.0, 7.0), "regression"),
    ((0.0, 1.0), "regression"),
    ((0.0, 3.0), "regression"),
    ((-3.0, 0.0), "regression"),
    ((-5.0, 5.0), "regression"),
    ((-1.0, 7.0), "regression"),
    ((-7.0, 1.0), "regression"),
  ],
)
def test_scale_of_labels(label_range, scale):
  assert metrics.scale_of(SPEC._replace(label_range=label_range)) == scale


@pytest.mark.parametrize("scale", SPECS)
def test_a_scale_has_its_metrics_in_the_order_of_the_tables(scale):
  spec = SPECS[scale]
  assert metrics.scale_of(spec) == scale
  prediction = np.eye(3)[[0, 1, 1, 2]] if spec.num_classes else [0.5, -0.5, 0.1, 0.9]
  label = [0, 1, 2, 2] if spec.num_classes else [0.6, -0.6, 0.0, 1.0]
  found = metrics.compute(spec, prediction, label, swapped=True)
  plain = {name: value for name, value in found.items() if not name.endswith("_swapped")}
  assert tuple(plain) == metrics.names(spec)
  assert len(found) - len(plain) == {"sentiment": 2, "sims": 1}.get(scale, 0)
  assert plain == getattr(metrics, scale)(prediction, label)
  assert plain == metrics.compute(spec, prediction, label)
  assert all(scale in metrics.info(name).needs for name in found)


def test_scales_of_no_binning_have_errors_only():
  found = metrics.compute(SPECS["regression"], [5.0, 5.0, 5.0, 6.0], [3.0, 4.0, 6.0, 7.0])
  corr = np.corrcoef([5, 5, 5, 6], [3, 4, 6, 7])[0, 1]
  assert found == {"mae": pytest.approx(5 / 4), "corr": pytest.approx(corr)}


@pytest.mark.parametrize("scale", SPECS)
def test_one_nan_prediction_makes_every_metric_nan(scale):
  """A model that diverged has no accuracy: neither 0.25 by arg-max nor an error."""
  spec = SPECS[scale]
  prediction = np.eye(3)[[0, 1, 1, 2]] if spec.num_classes else np.float32([0.5, -0.5, 0.1, 0.9])
  label = [0, 1, 2, 2] if spec.num_classes else [0.6, -0.6, 0.0, 1.0]
  for spoilt in ((2,), (0, 1, 2, 3)):
    p = prediction.copy()
    p[list(spoilt)] = np.nan
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      found = metrics.compute(spec, p, label, swapped=True)
    assert set(found) >= set(metrics.names(spec)) and np.isnan(list(found.values())).all()


def test_an_infinite_prediction_has_no_correlation():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = metrics.compute(SPEC, [np.inf, 1.0], [1.0, -1.0])
  assert found["mae"] == np.inf and np.isnan(found["corr"]) and found["acc2_non0"] == 0.5


def test_what_is_known_of_a_metric():
  assert metrics.info("mae").better == "min"
  assert all(m.better == "max" for name, m in metrics.METRICS.items() if name != "mae")
  assert metrics.info("f1_12") == ("max", "F1 of class 12", False, ("classification",))
  swapped = metrics.info("f1_swapped")
  assert swapped.title.endswith("swapped") and not swapped.headline and swapped.better == "max"
  for wrong in ("f1_x", "acc_swapped", "loss", "f1_3_swapped"):
    with pytest.raises(types.UsageError, match=wrong):
      metrics.info(wrong)
  with pytest.raises(types.UsageError, match="'acc7'"):
    metrics.info("acc_7")


def test_headline_metrics_are_the_first_four_that_a_task_has():
  expected = {
    "sentiment": ["mae", "corr", "acc2_non0", "acc7"],
    "sims": ["mae", "corr", "acc2", "f1"],
    "regression": ["mae", "corr"],
    "classification": ["acc", "uar", "f1"],
  }
  for scale, spec in SPECS.items():
    assert metrics.headline(metrics.names(spec)[::-1]) == expected[scale]
  assert metrics.headline(["f1_0", "train_loss", "corr"]) == ["corr"]
  assert metrics.headline(metrics.METRICS, most=2) == ["mae", "corr"]


def test_names_are_ordered_as_the_tables_are_and_strangers_follow():
  assert metrics.ordered(["mine", "f1_1", "acc7", "f1_0", "mae"]) == [
    "mae",
    "acc7",
    "mine",
    "f1_1",
    "f1_0",
  ]
