import jax
import numpy as np
import pytest

import toy
from mmjax import evaluate, masking

SPLIT = toy.make_batch(10, seed=3)
PARAMS, EXTRA = toy.init(jax.random.key(0), toy.SPEC)
CONDITIONS = evaluate.parse_rates("0,0.5") + [evaluate.missing_condition("la")]


def predictions(split=SPLIT, conditions=CONDITIONS, seeds=(0, 1), **kwargs):
  grid = evaluate.make_grid(toy.make_system(), split, conditions, seeds, **kwargs)
  return grid(PARAMS, EXTRA)


@pytest.fixture(scope="module")
def expected():
  return predictions()


def test_complete_data_give_the_plain_predictions(expected):
  plain = toy.predict(PARAMS, SPLIT, EXTRA)["prediction"]
  np.testing.assert_allclose(expected[0], np.stack([plain, plain]), rtol=1e-5)
  assert expected.shape == (3, 2, 10)


def test_masks_depend_on_condition_seed_and_sample_alone(expected):
  assert (expected[1, 0] != expected[1, 1]).any()
  np.testing.assert_array_equal(expected[2, 0], expected[2, 1])  # nothing random is left
  np.testing.assert_allclose(predictions(batch_size=3), expected, rtol=1e-5)
  reversed_ = predictions(conditions=CONDITIONS[::-1], seeds=(1, 0))
  np.testing.assert_allclose(reversed_[::-1, ::-1], expected, rtol=1e-5)
  order = np.random.default_rng(0).permutation(10)
  shuffled = predictions(split=jax.tree.map(lambda a: a[order], SPLIT))
  np.testing.assert_allclose(shuffled, expected[:, :, order], rtol=1e-5)


def test_what_is_missing_cannot_change_a_prediction(expected):

  def poison(m, value):
    return m._replace(x=np.where(m.valid[..., None], np.float32(value), m.x))

  poisoned = SPLIT._replace(text=poison(SPLIT.text, np.nan), audio=poison(SPLIT.audio, 1e9))
  found = predictions(split=poisoned)
  np.testing.assert_array_equal(found[2], expected[2])
  assert np.isnan(found[0]).all()


def test_a_grid_is_traced_once():
  traces = []

  def mask(rate):
    traces.append(1)
    return masking.bernoulli(rate)

  conditions = evaluate.parse_rates("0.1,0.4", mask=mask)
  conditions.append(evaluate.missing_condition("a", mask=mask))
  grid = evaluate.make_grid(toy.make_system(), SPLIT, conditions, [0, 1], batch_size=4)
  first = grid(PARAMS, EXTRA)
  again = grid(jax.tree.map(np.negative, PARAMS), EXTRA)
  np.testing.assert_allclose(again, first, rtol=1e-5)  # tanh is odd
  assert len(traces) == 1


def test_rows_carry_condition_seed_and_metrics(expected):
  rows = evaluate.robustness(toy.make_system(), PARAMS, EXTRA, SPLIT, toy.SPEC, CONDITIONS, [0, 1])
  assert [(r["condition"], r["mask_seed"]) for r in rows[:3]] == [("0", 0), ("0", 1), ("0.5", 0)]
  mae = np.abs(expected - SPLIT.label).mean(-1).ravel()
  np.testing.assert_allclose([r["mae"] for r in rows], mae, rtol=1e-5)
  validate = evaluate.make_validator(toy.make_system(), SPLIT, toy.SPEC, CONDITIONS[1], seed=1)
  np.testing.assert_allclose(validate(PARAMS, EXTRA)["mae"], mae[3], rtol=1e-5)


def test_conditions_are_parsed():
  assert [c.name for c in evaluate.parse_rates("0:0.9:0.1")] == [f"{n / 10:g}" for n in range(10)]
  (interval,) = evaluate.parse_rates("0.4-0.6")
  np.testing.assert_allclose(interval.settings["rate"], [[0.4, 0.6]] * 3)
  np.testing.assert_array_equal(evaluate.missing_condition("va").settings["rate"][:, 0], [0, 1, 1])
  for wrong in ("0.6-0.4", "1.5", "0:1:0"):
    with pytest.raises(ValueError, match="rate"):
      evaluate.parse_rates(wrong)
  with pytest.raises(ValueError, match="letters"):
    evaluate.missing_condition("t")
