"""What is particular to one system: tables, memories, phases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models_test
from mmjax import masking, meta, models, optim, train, types
from mmjax.models import mmim, self_mm


def test_moments_add_up_to_those_of_the_union():
  random = np.random.default_rng(0)
  x = random.normal(size=(9, 3)).astype(np.float32)
  chosen = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], bool)
  parts = [mmim.moments(x[:4], chosen[:4]), mmim.moments(x[4:], chosen[4:])]
  empty = mmim.moments(x[:2], np.zeros(2, bool))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts, empty)
  total = mmim.total_moments(stacked)
  assert total.count == 7
  np.testing.assert_allclose(total.mean, x[chosen].mean(0), rtol=1e-5)
  covariance = np.cov(x[chosen].T, bias=True)
  np.testing.assert_allclose(total.scatter / 7, covariance, rtol=1e-4, atol=1e-6)
  value, exists = mmim.log_determinant(total)
  np.testing.assert_allclose(value, np.linalg.slogdet(covariance)[1], rtol=1e-4)
  assert exists


def test_an_entropy_that_does_not_exist_is_left_out():
  """Samples that are all alike have no covariance: neither -inf nor NaN may come out."""

  def entropy(scale):
    x = scale * jnp.ones((6, 2))
    return mmim.log_determinant(mmim.moments(x, jnp.ones(6)))[0]

  value, gradient = jax.value_and_grad(entropy)(0.5)
  assert np.isfinite(value) and np.isfinite(gradient)
  assert not mmim.log_determinant(mmim.moments(jnp.ones((6, 2)), jnp.ones(6)))[1]


def test_mmims_memory_fills_and_starts_afresh_each_epoch():
  system = models.MODELS["mmim"](**models_test.SETTINGS["mmim"], memory_size=2)
  spec = models_test.make_spec(False, 0)
  params, extra = system.init(models_test.make_key(0), spec)
  loss = jax.jit(lambda batch, extra: system.phases[1].loss(params, batch, None, extra)[1])
  seen = []
  for step in range(5):
    epoch = jnp.int32(step // 4)
    aux = loss(models_test.make_batch(spec, seed=step), {**extra, "epoch": epoch})
    extra = aux.extra
    seen.append((int(extra["batches"]), float(aux.metrics["H"])))
    counts = np.asarray(extra["memory"]["tv"].count).sum(1)
    assert (counts > 0).tolist() == [True, step in (1, 2, 3)]
  assert [batches for batches, _ in seen] == [1, 2, 3, 4, 1]
  assert [entropy != 0 for _, entropy in seen[:3]] == [False] * 3  # while it fills


def tables(labels, features):
  label = {task: jnp.asarray(labels, jnp.float32) for task in self_mm.TASKS}
  return {"label": label, "feature": {t: jnp.asarray(features) for t in self_mm.TASKS}}


def test_labels_are_generated_from_the_second_epoch_on():
  """By hand: centres at (1, 0) and (-1, 0); text lies at the positive one, fusion between."""
  before = tables([2.0, -2.0, 1.0], np.float32([[1, 0], [-1, 0], [0, 0]]))
  before["label"] = {task: v.at[2].set(jnp.nan) for task, v in before["label"].items()}
  features = {task: jnp.zeros((1, 2)) for task in self_mm.TASKS}  # equally far: δ = 0
  features["text"] = jnp.float32([[0.5, 0.0]])  # 0.5 from the positive, 1.5 from the negative
  run = functools.partial(self_mm.update_tables, index=jnp.array([1]), bound=3.0)
  first = run(before, features, epoch=jnp.int32(0))
  np.testing.assert_array_equal(first["label"]["text"], before["label"]["text"])
  np.testing.assert_array_equal(first["feature"]["text"][1], features["text"][0])
  second = run(before, features, epoch=jnp.int32(1))
  # δ_text = (1.5 - 0.5) / 0.5 = 2, δ_fusion = 0: α is huge, so the new label is cut at -3
  np.testing.assert_allclose(second["label"]["text"][1], 1 / 3 * -2 + 2 / 3 * -3, rtol=1e-5)
  # audio is as far as fusion: δ = 0 twice, the shifted half alone is left
  np.testing.assert_allclose(second["label"]["audio"][1], 1 / 3 * -2 + 2 / 3 * -1, rtol=1e-5)
  np.testing.assert_array_equal(second["label"]["fusion"], before["label"]["fusion"])


@pytest.mark.parametrize("exclude_zero", [True, False])
def test_centers_leave_out_what_was_not_met(exclude_zero):
  label = jnp.float32([1.0, 0.0, -1.0, jnp.nan, 2.0])
  feature = jnp.float32([[2.0], [4.0], [8.0], [99.0], [6.0]])
  positive, negative = self_mm.centers(label, feature, exclude_zero)
  np.testing.assert_allclose([positive[0], negative[0]], [4.0, 8.0])
  nothing = self_mm.centers(jnp.full(5, jnp.nan), feature, exclude_zero)
  np.testing.assert_array_equal(nothing, np.zeros((2, 1)))


def test_the_complement_is_what_the_student_does_not_see():
  batch = models_test.make_batch(models_test.make_spec(False, 0))
  masked = masking.span(0.5)(jax.random.key(0), batch)
  for name in types.MODALITIES:
    shown, hidden, whole = (
      masking.observed(getattr(b, name))
      for b in (masked, masking.complement(masked), masking.complete(masked))
    )
    np.testing.assert_allclose(shown + hidden, whole)
    np.testing.assert_array_equal(whole, getattr(batch, name).x)
    assert (np.asarray(hidden) != 0).any()


def test_mmins_student_begins_as_its_teacher_and_is_what_gets_selected():
  settings = {**models_test.SETTINGS["mmin"], "teacher_epochs": 2}
  system = models.MODELS["mmin"](**settings)
  spec = models_test.make_spec(False, 0)._replace(num_train=5)
  data = models_test.make_batch(spec)._replace(index=jnp.arange(5))
  rates = {"teacher": 0.01, "student": 0.0}
  plan = train.Recipe(
    system=system,
    method=lambda key: functools.partial(meta.sampled_missing, mask=masking.span(0.5)),
    optimizers={p: optim.make(learning_rate=rate) for p, rate in rates.items()},
    batch_size=5,
    epochs=4,
    patience=2,
  )
  key, scores = jax.random.key(0), iter([0.1, 0.2, 0.5, 0.4])  # the first two do not count
  start = train.start(plan, data, spec, key)
  reports = train.fit(plan, data, lambda params, extra: {"mae": next(scores)}, start, key)
  found = [(report.is_best, jax.device_get(report.progress.state.params)) for report in reports]
  assert [is_best for is_best, _ in found] == [False, False, True, True]
  student, teacher = found[-1][1]["student"]["encoders"], found[-1][1]["teacher"]["encoders"]
  jax.tree.map(np.testing.assert_array_equal, student, teacher)
  fresh = found[0][1]["student"]["encoders"]["audio"]["rnn"]["w_ih"]
  assert (fresh != teacher["audio"]["rnn"]["w_ih"]).any()
