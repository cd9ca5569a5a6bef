"""TransM: what its translations aim at, and what it reads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mmjax import masking, systems, types
from mmjax.models import transm

TINY: Any = dict(size=4, heads=2)


def apply(batch, names, **settings: Any):
  """These entries of what the network returns in training; others are not compiled."""
  network = transm.TransM(**TINY, **settings)
  model = systems.functional(network, head="head")
  params, _ = model.init(jax.random.key(0), toy.SPEC)

  @jax.jit
  def chosen(batch):
    out, _ = model.apply(params, batch, {}, train=True)
    return [out[name] for name in names]

  return chosen(batch)


def test_translations_have_the_shapes_of_what_they_restore():
  batch = toy.make_batch(3)
  model = systems.functional(transm.TransM(**TINY), head="head")
  params, _ = jax.eval_shape(lambda: model.init(jax.random.key(0), toy.SPEC))
  out, _ = jax.eval_shape(lambda p: model.apply(p, batch, {}, train=True), params)
  for key, name in transm.TRANSLATIONS.items():
    assert out[f"translated_{key}"].shape == getattr(batch, name).x.shape
  assert out["feature"].shape == (3, 7 * 4)


def test_translations_aim_at_complete_or_at_observed_text():
  batch = jax.tree.map(jnp.asarray, toy.make_batch(3))
  masked = masking.span(0.5)(jax.random.key(0), batch)
  (complete,), (observed,) = (apply(masked, ["target_text"], targets=t) for t in transm.TARGETS)
  np.testing.assert_array_equal(complete, batch.text.x)
  np.testing.assert_array_equal(observed, masking.observed(masked.text))


def test_translation_by_hand():
  """Translations are off by 1 on what is observed and by 3 on what is missing."""
  batch = masking.span(0.5)(jax.random.key(0), jax.tree.map(jnp.asarray, toy.make_batch(4)))
  out = {"target_text": batch.text.x}
  for key, name in transm.TRANSLATIONS.items():
    m: types.Modality = getattr(batch, name)
    out[f"translated_{key}"] = m.x + jnp.where(m.seen, 1.0, 3.0)
  np.testing.assert_allclose(transm.translation(out, batch, "observed"), 4.0, rtol=1e-5)
  expected = 0.0
  for name in transm.TRANSLATIONS.values():
    m = getattr(batch, name)
    error = np.where(m.seen, 1.0, 3.0)[..., 0]
    expected += error[np.asarray(m.valid)].mean()
  np.testing.assert_allclose(transm.translation(out, batch, "complete"), expected, rtol=1e-5)


def test_learned_queries_do_not_read_their_target():
  """The first translation of the audio then depends on the text alone."""
  batch = jax.tree.map(jnp.asarray, toy.make_batch(3))
  other = batch._replace(audio=batch.audio._replace(x=batch.audio.x + 1.0))
  both = jax.tree.map(lambda *x: jnp.concatenate(x), batch, other)
  for query, same in (("learned", True), ("target", False)):
    (found,) = apply(both, ["translated_audio"], query=query)
    assert np.allclose(found[:3], found[3:], atol=1e-6) is same


def test_wrong_choices_are_refused():
  for name in ("query", "targets", "regression"):
    with pytest.raises(ValueError, match=name):
      transm.make(**{name: "nonsense"})
  with pytest.raises(ValueError, match="heads"):
    transm.make(size=6, heads=4)
