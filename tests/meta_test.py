import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import toy
from mmjax import layers, masking, meta, optim, types

pytestmark = pytest.mark.usefixtures("quick_compilation")


def no_mask(key, batch):
  del key
  return batch


def quadratic(params, batch, key, extra):
  """0.5 E[(θ - y)²]: its inner loop and both meta-gradients have closed forms."""
  del key
  value = 0.5 * jnp.mean((params["theta"] - batch.label) ** 2)
  return value, types.Aux({"value": value}, extra)


def labelled(support, query):
  batch = toy.make_batch(4)
  return batch._replace(label=np.float32([support, support, query, query]))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
  ("order", "mode"), [("first", "reverse"), ("second", "reverse"), ("second", "mixed")]
)
def test_closed_form_on_a_quadratic(steps, order, mode):
  theta, a, b, rate = 2.0, -1.0, 0.5, 0.1
  loss = meta.m3s(
    quadratic, no_mask, inner_steps=steps, inner_optimizer=optax.sgd(rate), order=order, mode=mode
  )
  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  params = {"theta": jnp.float32(theta)}
  (value, aux), grads = gradient(params, labelled(a, b), jax.random.key(0), {})
  shrink = (1 - rate) ** steps
  adapted = a + shrink * (theta - a)
  np.testing.assert_allclose(value, 0.5 * (adapted - b) ** 2, rtol=1e-5)
  np.testing.assert_allclose(aux.metrics["support_loss"], 0.5 * (theta - a) ** 2, rtol=1e-5)
  expected = (adapted - b) * (shrink if order == "second" else 1.0)
  np.testing.assert_allclose(grads["theta"], expected, rtol=1e-5)


@pytest.mark.parametrize("mode", meta.MODES)
@pytest.mark.parametrize(
  "inner",
  [
    dict(name="sgd", learning_rate=0.1),
    dict(name="sgd", learning_rate=0.1, momentum=0.9),
    dict(name="adam", learning_rate=0.05),
  ],
  ids=["sgd", "momentum", "adam"],
)
def test_second_order_equals_finite_differences(inner, mode):
  with jax.enable_x64(True):
    batch = jax.tree.map(jnp.asarray, toy.make_batch(6, dtype=np.float64))
    params = jax.tree.map(jnp.float64, toy.init(jax.random.key(0), toy.SPEC)[0])
    loss = meta.m3s(
      toy.loss,
      masking.span((0.3, 0.6)),
      inner_steps=3,
      inner_optimizer=optim.make(**inner, differentiable=True),
      order="second",
      fresh_masks=True,
      mode=mode,
    )
    flat, restore = jax.flatten_util.ravel_pytree(params)
    value = jax.jit(lambda flat: loss(restore(flat), batch, jax.random.key(1), {})[0])
    found = jax.grad(value)(flat)
    eps = 1e-6
    steps = eps * jnp.eye(flat.size)
    expected = jax.vmap(lambda d: (value(flat + d) - value(flat - d)) / (2 * eps))(steps)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_an_adam_that_is_differentiated_survives_zero_gradients():
  def loss(params, batch, key, extra):  # no gradient at all for "idle"
    value, aux = quadratic(params, batch, key, extra)
    return value + 0.0 * params["idle"], aux

  params = {"theta": jnp.float32(1.0), "idle": jnp.float32(1.0)}
  inner = optim.make(name="adam", learning_rate=0.1, differentiable=True)
  outer = meta.m3s(loss, no_mask, inner_optimizer=inner, order="second")
  grads = jax.grad(outer, has_aux=True)(params, labelled(0.0, 1.0), jax.random.key(0), {})[0]
  chex.assert_tree_all_finite(grads)


def test_mixed_mode_is_exact_through_stopped_gradients_but_not_through_reversed_ones():
  def loss_of(through):
    def loss(params, batch, key, extra):
      del key
      hidden = jnp.tanh(batch.text.x.mean(1) @ params["a"])
      value = jnp.mean((through(hidden) @ params["b"] - batch.label) ** 2)
      return value + jnp.mean(hidden**2), types.Aux({}, extra)

    return loss

  a, b = jax.random.normal(jax.random.key(1), (2, toy.SHAPES["text"][1], 3))
  params = {"a": a, "b": b[0]}

  def meta_gradient(through, mode):
    loss = meta.m3s(
      loss_of(through), no_mask, inner_optimizer=optax.sgd(0.1), order="second", mode=mode
    )
    return jax.grad(loss, has_aux=True)(params, toy.make_batch(8), jax.random.key(0), {})[0]

  stopped = lambda h: h * jax.lax.stop_gradient(jnp.abs(h))  # noqa: E731
  chex.assert_trees_all_close(*(meta_gradient(stopped, mode) for mode in meta.MODES), rtol=1e-5)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(
      *(meta_gradient(layers.reverse_gradient, mode) for mode in meta.MODES), rtol=1e-2
    )


def _scans(jaxpr, found):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      found.append(equation.params["reverse"])
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        _scans(inner, found)
  return found


@pytest.mark.parametrize("order", meta.ORDERS)
def test_only_the_second_order_differentiates_the_inner_loop(order):
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  loss = meta.m3s(toy.loss, masking.span(0.5), inner_steps=4, order=order)
  jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(
    params, toy.make_batch(8), jax.random.key(0), extra
  )
  backward = any(_scans(jaxpr.jaxpr, []))
  assert backward == (order == "second")


def test_extra_advances_once_a_step_and_on_the_query_set():
  params, extra = toy.init(jax.random.key(0), toy.SPEC)

  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, extra)
    return value, aux._replace(extra={**aux.extra, "seen": batch.index})

  extra["seen"] = jnp.zeros(4, jnp.int32)
  batch = toy.make_batch(8)
  _, aux = meta.m3s(loss, no_mask, inner_steps=3)(params, batch, jax.random.key(0), extra)
  assert aux.extra["calls"] == 1
  np.testing.assert_array_equal(aux.extra["seen"], batch.index[4:])


def seen_of(method, key, rows=16):
  """Which text steps a method's loss sees, [rows, L]."""

  def loss(params, batch, key, extra):
    del params, key
    return jnp.float32(0), types.Aux({}, {"seen": batch.text.seen})

  return np.asarray(method(loss)({}, toy.make_batch(rows), key, {})[1].extra["seen"])[..., 0]


def test_orig_keeps_its_masks_and_spl_draws_them_afresh():
  mask = masking.span(0.5)
  one, two = jax.random.split(jax.random.key(0))
  orig = functools.partial(meta.fixed_missing, mask=mask, key=jax.random.key(7))
  spl = functools.partial(meta.sampled_missing, mask=mask)
  np.testing.assert_array_equal(seen_of(orig, one), seen_of(orig, two))
  assert not seen_of(orig, one).all()
  assert (seen_of(spl, one) != seen_of(spl, two)).any()


@pytest.mark.parametrize("fresh", [False, True])
def test_support_and_query_are_masked_on_their_own(fresh):
  """The masks of the inner and outer losses, told apart by a value that tells the mask."""
  weights = np.random.default_rng(0).normal(size=(16, toy.SHAPES["text"][0]))

  def loss(params, batch, key, extra):
    del key
    value = jnp.sum(batch.text.seen[..., 0] * weights)
    return value + params["theta"], types.Aux({"mask": value}, extra)

  batch = toy.make_batch(32)
  batch = jax.tree.map(lambda a: np.concatenate([a[:16], a[:16]]), batch)  # X1 == X2
  key = jax.random.key(3)
  keys = meta.meta_keys(key, 3, fresh)
  params = {"theta": jnp.float32(0)}
  support, _ = meta.split_support_query(batch)
  mask = masking.span(0.5)
  _, losses = meta.adapt(
    loss, mask, params, support, keys, {}, optimizer=optax.sgd(0.0), fresh_masks=fresh
  )
  _, aux = meta.m3s(loss, mask, inner_steps=3, fresh_masks=fresh)(params, batch, key, {})
  assert (len(set(np.asarray(losses).tolist())) > 1) == fresh
  assert aux.metrics["mask"] not in np.asarray(losses)


def test_wrong_use_is_refused():
  with pytest.raises(ValueError, match="order"):
    meta.m3s(quadratic, no_mask, order="third")
  with pytest.raises(ValueError, match="mode"):
    meta.m3s(quadratic, no_mask, mode="forward")
  with pytest.raises(ValueError, match="inner_steps"):
    meta.m3s(quadratic, no_mask, inner_steps=0)
  with pytest.raises(ValueError, match="2B rows"):
    meta.m3s(quadratic, no_mask)({"theta": 0.0}, toy.make_batch(5), jax.random.key(0), {})
