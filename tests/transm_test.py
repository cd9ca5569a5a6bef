"""TransM: what its translations aim at, and what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mmjax import masking, systems, types
from mmjax.models import transm

TINY = dict(size=4, heads=2)


def apply(batch, **settings):
  network = transm.TransM(**TINY, **settings)
  model = systems.functional(network, head="head")
  params, _ = model.init(jax.random.key(0), toy.SPEC)
  return jax.jit(lambda batch: model.apply(params, batch, {}, train=True)[0])(batch)


def test_translations_have_the_shapes_of_what_they_restore():
  batch = jax.tree.map(jnp.asarray, toy.make_batch(3))
  masked = masking.span(0.5)(jax.random.key(0), batch)
  complete, observed = (apply(masked, targets=targets) for targets in transm.TARGETS)
  for key, name in transm.TRANSLATIONS.items():
    assert complete[f"translated_{key}"].shape == getattr(batch, name).x.shape
  np.testing.assert_array_equal(complete["target_text"], batch.text.x)
  np.testing.assert_array_equal(observed["target_text"], masking.observed(masked.text))
  assert complete["feature"].shape == (3, 7 * 4)
  # what is predicted does not depend on what is aimed at
  np.testing.assert_array_equal(complete["prediction"], observed["prediction"])


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
  for query, same in (("learned", True), ("target", False)):
    one, two = (apply(b, query=query)["translated_audio"] for b in (batch, other))
    assert bool((np.asarray(one) == np.asarray(two)).all()) is same


def test_wrong_choices_are_refused():
  for name in ("query", "targets", "regression"):
    with pytest.raises(ValueError, match=name):
      transm.make(**{name: "nonsense"})
  with pytest.raises(ValueError, match="heads"):
    transm.make(size=6, heads=4)
