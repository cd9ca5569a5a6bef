"""Planted data: the optimum in closed form is what simulation gives, and nothing is below it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from mmjax import data, evaluate, masking, metrics, planted, types

ROWS = 4000
CONDITIONS = [
  *(evaluate.rate_condition(rate) for rate in (0.0, 0.5, 0.9)),
  evaluate.missing_condition("la"),
]


def load(world, task):
  arrays = planted.make_arrays(world, seed=1, num_train=300, num_valid=20, num_test=ROWS)
  return data.from_arrays(arrays, name="planted", task=task)


def found(world, dataset):
  """Predictions [C, N, ...] of the optimum and the variances [C, N] that it states."""
  system = planted.optimum(world)

  @jax.jit
  def run(batch):
    each = [
      system.predict({}, masking.erase(one.mask(**one.settings)(jax.random.key(0), batch)), {})
      for one in CONDITIONS
    ]
    return jax.tree.map(lambda *a: jnp.stack(a), *each)

  both = run(dataset.test)
  return np.asarray(both["prediction"]), np.asarray(both["variance"])


@pytest.mark.parametrize("strength", ["low", "high"])
def test_the_error_of_the_optimum_is_its_closed_form(strength):
  world = planted.make_world(planted.STRENGTHS[strength])
  dataset = load(world, "regression")
  predictions, variances = found(world, dataset)
  best = planted.best_mae(variances).mean(1)
  label = np.asarray(dataset.test.label)
  measured = np.abs(predictions - label[None]).mean(1)
  np.testing.assert_allclose(measured, best, rtol=0.04)  # three standard errors
  assert (np.diff(best[:3]) > 0).all() and np.abs(label.std() - 1) < 0.04
  np.testing.assert_allclose(
    ((predictions - label[None]) ** 2).mean(1), variances.mean(1), rtol=0.08
  )
  # complete data, from the means of the steps: a linear fit comes near, and no nearer
  means = lambda b: np.concatenate(  # noqa: E731
    [getattr(b, m).x.sum(1) / getattr(b, m).valid.sum(1, keepdims=True) for m in types.MODALITIES],
    1,
  )
  fitted = RidgeCV(np.logspace(-2, 3, 6)).fit(means(dataset.train), dataset.train.label)
  error = np.abs(fitted.predict(means(dataset.test)) - label).mean()
  assert measured[0] < error < 1.25 * measured[0]


def test_redundancy_is_what_a_lost_modality_costs_little():
  """Without text and audio: v in closed form from vision's one number, and falling with ρ."""
  rows = []
  for rho in planted.STRENGTHS.values():
    world = planted.make_world(rho)
    alone = planted.variance(world, [0, 0, 25])
    covariance = (world.covariance @ world.weight)[2]  # of the score and vision's view
    expected = 1 - covariance**2 / (1 + 1 / (25 * world.clarity[2] ** 2))
    np.testing.assert_allclose(alone, expected)
    np.testing.assert_allclose(planted.variance(world, [0, 0, 0]), 1)
    rows.append(alone)
  assert rows[0] > rows[1] > rows[2]


def test_the_accuracy_of_the_optimum_is_its_closed_form():
  world = planted.make_world(0.5, scores=2)
  dataset = load(world, "classification")
  assert dataset.spec.num_classes == 4 and set(dataset.classes) == set(planted.EMOTIONS)
  predictions, variances = found(world, dataset)
  label = np.asarray(dataset.test.label)
  measured = [metrics.compute(dataset.spec, one, label)["acc"] for one in predictions]
  np.testing.assert_allclose(measured, planted.best_accuracy(variances).mean(1), atol=0.025)
  assert np.diff(measured[:3]).max() < 0


def test_worlds_and_masks_without_an_optimum_are_refused():
  for given in (dict(redundancy=1.0), dict(redundancy=0.5, scores=3)):
    with pytest.raises(types.UsageError, match=list(given)[-1]):
      planted.make_world(**given)
  world = planted.make_world(0.5)
  batch = types.example_batch(load(world, "regression").spec)
  text = batch.text._replace(seen=np.ones((1, 1, 16), bool))
  with pytest.raises(types.UsageError, match="channels"):
    planted.optimum(world).predict({}, batch._replace(text=text), {})
