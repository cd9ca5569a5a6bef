"""CorrKD, re-implemented from descriptions: its losses against hand-worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mmjax import masking, types
from mmjax.models import corrkd


def test_contrast_by_hand():
  """Distances of pairs: 3-4-5 of a sample's own, to the others' 0.6 and 2 (beyond the margin)."""
  teacher = jnp.array([[0.0, 0.0], [3.0, 5.2]])
  student = jnp.array([[3.0, 4.0], [0.0, 0.6]])
  pulled = (25 + (9 + 4.6**2)) / 2
  near, far = np.hypot(0, 1.2), 0.6  # s_0 to t_1, s_1 to t_0
  pushed = ((1.5 - near) ** 2 + (1.5 - far) ** 2) / 2
  np.testing.assert_allclose(corrkd.contrast(teacher, student, 1.5), pulled + pushed, rtol=1e-5)
  np.testing.assert_allclose(corrkd.contrast(teacher, student, 0.5), pulled, rtol=1e-6)
  unit = corrkd.contrast(teacher * 7 + 1, 3 * (teacher * 7 + 1), 1e-6, normalize=True)
  np.testing.assert_allclose(unit, 0, atol=1e-6)  # the length does not matter


def test_prototypes_by_hand():
  """Of three classes the batch has two; its two samples are the classes' means."""
  teacher = jnp.array([[1.0, 0.0], [0.0, 2.0]])
  student = jnp.array([[3.0, 0.0], [1.0, 1.0]])
  label = jnp.array([2, 0])
  cosines, there = corrkd.similarity(student, label, 3)
  np.testing.assert_array_equal(there, [True, False, True])
  half = np.sqrt(0.5)
  np.testing.assert_allclose(cosines[:, jnp.array([0, 2])], [[half, 1], [1, half]], rtol=1e-5)
  # the teacher's are 0 and 1 where the student's are √½ and 1
  found = corrkd.prototypes(teacher, student, label, 3)
  np.testing.assert_allclose(found, 2 * half / 4, rtol=1e-4)


def test_responses_split_the_probabilities():
  p = np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
  target, others = corrkd.responses(jnp.log(jnp.asarray(p)), jnp.array([0, 1]))
  np.testing.assert_allclose(target, [[0.5], [0.6]], rtol=1e-5)
  np.testing.assert_allclose(others, [[0.4, 0.6], [0.25, 0.75]], rtol=1e-5)
  logits, label = corrkd.classes(jnp.array([2.0, -1.0]), jnp.array([0.0, -0.5]))
  np.testing.assert_array_equal(label, [1, 0])
  np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1], jax.nn.sigmoid(jnp.array([2.0, -1.0])))


def test_parts_and_gradients_are_where_they_should_be():
  system = corrkd.make(size=4, heads=2, depth=1, statistics_size=3)
  for num_classes, critics in ((0, 1), (2, 1), (4, 2)):  # of two classes the others tell nothing
    spec = toy.SPEC._replace(num_classes=num_classes)
    params, extra = jax.eval_shape(lambda spec=spec: system.init(jax.random.key(0), spec))
    assert len(params["statistics"]) == critics and not extra
  spec = toy.SPEC._replace(num_classes=4)
  batch = masking.msm()(jax.random.key(0), jax.tree.map(jnp.asarray, toy.make_batch(6)))
  batch = batch._replace(label=jnp.arange(6, dtype=jnp.int32) % 4)
  params, extra = system.init(jax.random.key(0), spec)
  gradient = jax.jit(jax.value_and_grad(system.loss, has_aux=True))
  (value, aux), grads = gradient(params, batch, None, extra)
  assert set(aux.metrics) == {"task", "scd", "cpd", "rcd"}
  np.testing.assert_allclose(value, sum(aux.metrics.values()), rtol=1e-5)
  moved = {n for n, part in grads.items() if any(np.any(g) for g in jax.tree.leaves(part))}
  assert moved == {"student", "statistics"}


def test_every_part_can_be_left_out_and_wrong_choices_are_refused():
  batch, parts = toy.make_batch(4), {"task", "scd", "cpd", "rcd"}
  params = jax.eval_shape(lambda: corrkd.make().init(jax.random.key(0), toy.SPEC))[0]
  for name in ("scd", "cpd", "rcd"):
    loss = corrkd.make(**{f"{name}_weight": 0.0}).loss
    metrics = jax.eval_shape(loss, params, batch, None, {})[1].metrics
    assert set(metrics) == parts - {name}
  assert jax.eval_shape(corrkd.make(response="kl").loss, params, batch, None, {})
  for name in ("response", "norm", "negatives"):
    with pytest.raises(ValueError, match=name):
      corrkd.make(**{name: "nonsense"})


def test_it_says_what_it_is():
  words = "re-implementation from descriptions"
  assert words in (corrkd.__doc__ or "") and words in (corrkd.make.__doc__ or "")
  assert isinstance(corrkd.make(), types.System)
