"""Hard masks, another rate for the support sets, and what a step of each method costs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import toy
from experiments import build, settings
from mmjax import masking, meta, types

BATCH = toy.make_batch(6)
PARAMS, EXTRA = toy.init(jax.random.key(0), toy.SPEC)
EXTRA = {}
MASK = masking.bernoulli(0.5)
KEY = jax.random.key(3)
M = 4


@jax.jit
def errors(params, batch):
  """[B] the loss of each sample, by hand."""
  return (toy.predict(params, batch, {})["prediction"] - batch.label) ** 2


@jax.jit
def candidates(key, batch):
  return [MASK(one, batch) for one in jax.random.split(key, M)]


def choose(*settings):
  return jax.jit(meta.hardest(toy.loss, MASK, *settings))(PARAMS, BATCH, KEY, EXTRA)


def by_hand(params, batch, key):
  """Of M masks, each sample's hardest; and the loss that it has there."""
  drawn = candidates(key, batch)
  values = np.stack([errors(params, one) for one in drawn])
  worst = values.argmax(0)
  seen = {
    name: np.stack([getattr(drawn[m], name).seen[row] for row, m in enumerate(worst)])
    for name in types.MODALITIES
  }
  return seen, values.max(0)


def seen_of(batch):
  return {name: np.asarray(getattr(batch, name).seen) for name in types.MODALITIES}


def test_each_sample_gets_the_hardest_of_its_masks_or_all_that_of_the_batch():
  chosen = choose(M)
  chex.assert_trees_all_equal(seen_of(chosen), by_hand(PARAMS, BATCH, KEY)[0])
  chosen = choose(M, "batch")
  worst = max(candidates(KEY, BATCH), key=lambda one: errors(PARAMS, one).mean())
  chex.assert_trees_all_equal(chosen, worst)
  chosen = choose(1)
  chex.assert_trees_all_equal(chosen, MASK(KEY, BATCH))


def test_methods_train_on_the_hardest_masks():
  """The loss of SPL-TRN is the mean of the largest ones, that of M³S the same at θ*."""
  loss = meta.sampled_missing(toy.loss, MASK, hard_masks=M)
  (_, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, BATCH, KEY, EXTRA)
  mask_key, loss_key = jax.random.split(KEY)
  seen, values = by_hand(PARAMS, BATCH, mask_key)
  np.testing.assert_allclose(aux.metrics["mse"], values.mean(), rtol=1e-6)
  fixed = BATCH._replace(
    **{name: getattr(BATCH, name)._replace(seen=jnp.asarray(seen[name])) for name in seen}
  )
  expected = jax.jit(jax.grad(lambda p: toy.loss(p, fixed, loss_key, EXTRA)[0]))(PARAMS)
  chex.assert_trees_all_close(grads, expected, rtol=1e-6)

  pair = jax.tree.map(lambda a: a[:3], BATCH), jax.tree.map(lambda a: a[3:], BATCH)
  _, aux = jax.jit(meta.m3s(toy.loss, MASK, hard_masks=M))(PARAMS, pair, KEY, EXTRA)
  keys = meta.meta_keys(KEY, 1, False)
  adapted, _ = meta.adapt(toy.loss, MASK, PARAMS, pair[0], keys, EXTRA)
  hardest = by_hand(adapted, pair[1], keys.query_mask)[1]
  np.testing.assert_allclose(aux.metrics["mse"], hardest.mean(), rtol=1e-6)


def test_support_sets_have_a_rate_of_their_own():
  config = settings.load("quickstart:synthetic")
  settings.assign_all(config, {"mask.rate": "0.1,0.2", "method.support_rate": "0.9"})
  wrapped = build.make_method(config).wrap(toy.loss, KEY, {})
  found = jax.jit(wrapped)(PARAMS, BATCH, KEY, EXTRA)[0]
  lighter, harder = masking.span((0.1, 0.2)), masking.span(0.9)
  keys = meta.meta_keys(KEY, 1, False)
  support, query = meta.split_support_query(BATCH)
  adapted, _ = meta.adapt(toy.loss, harder, PARAMS, support, keys, EXTRA, optimizer=optax.sgd(1e-3))
  expected = toy.loss(adapted, lighter(keys.query_mask, query), keys.query_loss, EXTRA)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  settings.assign_all(config, {"mask.name": "drop", "mask.missing": "text"})
  with pytest.raises(types.UsageError, match="support_rate needs a mask that takes a rate"):
    build.make_method(config)


def test_what_cannot_be_hard_is_refused():
  for given in (dict(hard_masks=0), dict(hard_by="sample")):
    for method in ("spl", "m3s"):
      with pytest.raises(types.UsageError, match=next(iter(given))):
        meta.METHODS[method](MASK, **given)
  talk = BATCH._replace(info={"place": jnp.ones((6, 2), bool)})
  with pytest.raises(types.UsageError, match="hard_by='batch'"):
    meta.hardest(toy.loss, MASK, M)(PARAMS, talk, KEY, EXTRA)


@pytest.mark.parametrize(
  ("name", "given", "expected"),
  [
    ("orig", {}, (6, 6, 0, 0)),
    ("spl", dict(hard_masks=4), (6, 6, 0, 24)),
    ("m3s", dict(inner_steps=3), (12, 24, 0, 0)),
    ("m3s", dict(tasks=2, support_rows=2, hard_masks=3), (24, 24, 0, 60)),
  ],
)
def test_the_cost_of_a_step_is_what_it_computes(name, given, expected):
  """Rows of losses, counted as they are computed: with a derivative or without."""
  counted = []

  def counting(params, batch, key, extra):
    rows = lambda label, seen: counted.append(label.size)  # noqa: E731
    jax.debug.callback(rows, batch.label, batch.text.seen)
    return toy.loss(params, batch, key, extra)

  method = meta.METHODS[name](MASK, **given)
  assert method.cost is not None and tuple(method.cost(6)) == expected
  cost = method.cost(6)
  batch = toy.make_batch(6 * method.draws)
  loss = method.wrap(counting, KEY, {})
  jax.jit(jax.grad(lambda p: loss(p, batch, KEY, EXTRA)[0]))(PARAMS)
  jax.effects_barrier()
  assert cost.rows == len(batch.label) and sum(counted) == cost.gradients + cost.losses


def test_products_with_the_hessian_count_as_two_gradients():
  method = meta.METHODS["m3s"](MASK, inner_steps=3, order="second")
  assert method.cost is not None
  assert method.cost(5) == types.Cost(10, 20, 15, 0) and method.cost(5).equivalent == 50
  assert types.Cost(5, 5, 0, 30).equivalent == 15
