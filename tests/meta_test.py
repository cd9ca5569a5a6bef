import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprs
import toy
from experiments import parity
from experiments.parity.goldens import m3s as golden
from mmjax import layers, masking, meta, optim, registry, types


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


def finite_differences(value, flat, eps=1e-6):
  steps = eps * jnp.eye(flat.size)
  return jax.vmap(lambda d: (value(flat + d) - value(flat - d)) / (2 * eps))(steps)


@pytest.mark.parametrize("mode", meta.MODES)
@pytest.mark.parametrize(
  ("inner", "trains"),
  [
    (dict(name="sgd", learning_rate=0.1), ""),
    (dict(name="sgd", learning_rate=0.1, momentum=0.9), ""),
    (dict(name="adam", learning_rate=0.05), ""),
    (dict(name="sgd", learning_rate=0.1), "^encoder"),
  ],
  ids=["sgd", "momentum", "adam", "encoder"],
)
def test_second_order_equals_finite_differences(inner, trains, mode):
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
      inner_trains=trains,
    )
    flat, restore = jax.flatten_util.ravel_pytree(params)
    value = jax.jit(lambda flat: loss(restore(flat), batch, jax.random.key(1), {})[0])
    found = jax.grad(value)(flat)
    np.testing.assert_allclose(found, finite_differences(value, flat), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("remat", ["steps", "none"])
@pytest.mark.parametrize("mode", meta.MODES)
def test_all_that_a_step_reads_has_a_derivative(mode, remat):
  """Sample weights, `extra`, what a loss closes over, and the inner optimizer's own values."""
  with jax.enable_x64(True):
    batch = jax.tree.map(jnp.asarray, toy.make_batch(8, dtype=np.float64))
    params = jax.tree.map(jnp.float64, toy.init(jax.random.key(0), toy.SPEC)[0])

    def value(flat):
      weights, decay, closed_over, rate = flat[:8], flat[8], flat[9], flat[10]

      def loss(params, batch, key, extra):
        error = toy.predict(params, batch, extra)["prediction"] - batch.label
        value = jnp.mean(batch.info["weight"] * error**2)
        value += extra["decay"] * jnp.sum(params["encoder"]["kernel"] ** 2)
        value += closed_over * jnp.sum(params["head"]["kernel"] ** 4)
        return value, types.Aux({}, {**extra, "count": extra["count"] + 1})

      outer = meta.m3s(
        loss,
        masking.span(0.4),
        inner_steps=2,
        inner_optimizer=optax.contrib.schedule_free_sgd(rate),  # its first state depends on θ
        order="second",
        mode=mode,
        tasks=2,
        remat=remat,
      )
      extra = {"decay": decay, "count": jnp.int32(0)}
      return outer(params, batch._replace(info={"weight": weights}), jax.random.key(1), extra)[0]

    flat = jnp.array([*np.linspace(0.5, 1.5, 8), 0.1, 0.2, 0.1])
    value = jax.jit(value)
    found = jax.grad(value)(flat)
    expected = finite_differences(value, flat)
    assert (abs(expected) > 1e-4).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", meta.MODES)
def test_an_optimizer_reads_the_value_and_its_derivative(mode):
  """A step of 0.1 times the value: θ* = θ - 0.05 (θ - a)³."""

  def update(grads, state, params=None, *, value, grad, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda g: -0.1 * value * g, grad), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  theta, a, b = 2.0, -1.0, 0.5
  loss = meta.m3s(quadratic, no_mask, inner_optimizer=inner, order="second", mode=mode)
  params = {"theta": jnp.float32(theta)}
  grads, _ = jax.grad(loss, has_aux=True)(params, labelled(a, b), jax.random.key(0), {})
  adapted = theta - 0.05 * (theta - a) ** 3
  expected = (adapted - b) * (1 - 0.15 * (theta - a) ** 2)
  np.testing.assert_allclose(grads["theta"], expected, rtol=1e-5)


def test_an_inner_loop_is_one_step_of_sgd_by_default():
  """θ* = θ - α (θ - a), its derivative too; α is 1e-3, or the rates that are given."""
  theta, a = 2.0, -1.0

  def adapt(theta, **rates):
    params = {"theta": theta}
    adapted, losses = meta.adapt(
      quadratic, no_mask, params, labelled(a, a), jax.random.key(0), {}, **rates
    )
    return adapted["theta"] + losses.sum(), losses  # the losses have no derivative

  for rates, alpha in ({}, 1e-3), ({"inner_rates": {"theta": jnp.float32(0.2)}}, 0.2):
    gradient = jax.value_and_grad(functools.partial(adapt, **rates), has_aux=True)
    (value, losses), slope = gradient(jnp.float32(theta))
    np.testing.assert_allclose(losses, [0.5 * (theta - a) ** 2])
    np.testing.assert_allclose(value - losses[0], theta - alpha * (theta - a), rtol=1e-6)
    np.testing.assert_allclose(slope, 1 - alpha, rtol=1e-6)
  method = meta.METHODS["m3s"](no_mask).wrap(quadratic, jax.random.key(0), {})
  found = method({"theta": jnp.float32(theta)}, labelled(a, a), jax.random.key(0), {})[0]
  np.testing.assert_allclose(found, 0.5 * (0.999 * (theta - a)) ** 2, rtol=1e-5)


def test_an_optimizer_searches_along_the_value_function():
  params = {"theta": jnp.float32(2.0)}
  search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20))
  adapted, losses = meta.adapt(
    quadratic, no_mask, params, labelled(-1.0, -1.0), jax.random.key(0), {}, optimizer=search
  )
  np.testing.assert_allclose(adapted["theta"], -1.0, atol=1e-5)
  np.testing.assert_allclose(losses, [4.5])


def by_hand(params, support, query, key, *, steps, fresh, rates, order):
  """The query loss of one task, written out; `rates` is a tree like the parameters."""
  mask = masking.span((0.3, 0.6))
  support_mask, support_loss, query_mask, query_loss = jax.random.split(key, 4)
  losses = jax.random.split(support_loss, steps)
  masks = jax.random.split(support_mask, steps) if fresh else [support_mask] * steps
  held = jax.lax.stop_gradient if order == "first" else lambda tree: tree
  for step in range(steps):
    seen = mask(masks[step], support)
    grads = jax.grad(lambda p: toy.loss(p, seen, losses[step], {})[0])(params)  # noqa: B023
    params = jax.tree.map(lambda p, r, g: p - r * held(g), params, rates, grads)
  return toy.loss(params, mask(query_mask, query), query_loss, {})[0]


CASES = {
  "first": dict(),
  "mixed": dict(order="second", mode="mixed"),
  "sizes of tasks": dict(support_rows=3, tasks=2, fresh_masks=True),
  "pair of sizes": dict(pair=5, order="second"),
  "pair of tasks": dict(pair=4, tasks=2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_written_out(case):
  """Values, meta-gradients and rates' gradients; the algorithm's own loops, keys and rows."""
  settings = dict(CASES[case])
  pair, tasks = settings.pop("pair", None), settings.get("tasks", 1)
  order, fresh = settings.get("order", "first"), settings.get("fresh_masks", False)
  batch = toy.make_batch(8)
  params, _ = toy.init(jax.random.key(0), toy.SPEC)
  rates = {"encoder": {"kernel": 0.1}, "head": {"kernel": 0.05, "bias": -0.02}}
  rates = jax.tree.map(jnp.float32, rates)
  key = jax.random.key(5)
  cut = lambda low, high: jax.tree.map(lambda a: a[low:high], batch)  # noqa: E731

  def expected(params, rates):
    size = 8 // tasks
    if pair is None:
      support = settings.get("support_rows", size // 2)
      sets = [(cut(s, s + support), cut(s + support, s + size)) for s in range(0, 8, size)]
    else:
      s, q = pair // tasks, (8 - pair) // tasks
      sets = [
        (cut(t * s, (t + 1) * s), cut(pair + t * q, pair + (t + 1) * q)) for t in range(tasks)
      ]
    keys = [key] if tasks == 1 else jax.random.split(key, tasks)
    hand = functools.partial(by_hand, params, steps=2, fresh=fresh, rates=rates, order=order)
    return sum(hand(*both, k) for both, k in zip(sets, keys, strict=True)) / tasks

  def found(params, rates):
    loss = meta.m3s(
      toy.loss, masking.span((0.3, 0.6)), inner_steps=2, inner_rates=rates, **settings
    )
    given = batch if pair is None else (cut(0, pair), cut(pair, 8))
    return loss(params, given, key, {})[0]

  both = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, rates) for f in (found, expected)]
  chex.assert_trees_all_close(*both, rtol=2e-4, atol=1e-6)
  assert all(abs(g).max() > 1e-4 for g in jax.tree.leaves(both[0][1]))


def test_keys_of_a_step_are_all_different():
  data = lambda keys: np.unique(  # noqa: E731
    np.concatenate([np.reshape(jax.random.key_data(k), (-1, 2)) for k in keys]), axis=0
  )
  key = jax.random.key(0)
  assert len(data([*meta.meta_keys(key, 3, True), key[None]])) == 3 + 3 + 2 + 1
  assert len(data([*meta.meta_keys(key, 3, False), key[None]])) == 1 + 3 + 2 + 1


@pytest.mark.parametrize("tasks", [1, 2])
def test_legacy_keys_give_what_typed_keys_give(tasks):
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  loss = jax.jit(meta.m3s(toy.loss, masking.span(0.5), inner_steps=2, tasks=tasks))
  values = [
    loss(params, toy.make_batch(8), key, extra)[0]
    for key in (jax.random.key(3), jax.random.PRNGKey(3))
  ]
  assert values[0] == values[1]


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_task_depends_on_its_own_key_under_every_generator(impl):
  params, _ = toy.init(jax.random.key(0), toy.SPEC)
  batch = toy.make_batch(8)
  key = jax.random.key(3, impl=impl)
  loss = functools.partial(meta.m3s, toy.loss, no_mask, inner_steps=2)
  found = jax.jit(loss(tasks=2))(params, batch, key, {})[0]
  keys = jax.random.split(key, 2)
  alone = jax.jit(loss())
  halves = [jax.tree.map(lambda a: a[i : i + 4], batch) for i in (0, 4)]  # noqa: B023
  expected = [alone(params, half, keys[i], {})[0] for i, half in enumerate(halves)]
  np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_extra_goes_through_the_query_sets_in_order():
  """What a loss changes in `extra` reaches the next task as a number, without a derivative."""

  def loss(params, batch, key, extra):
    del key
    error = params["theta"] - jnp.mean(batch.label) - extra["shift"]
    after = {"shift": params["theta"], "rows": 10 * extra["rows"] + batch.index[0]}
    return error**2, types.Aux({"shift": extra["shift"], "rows": extra["rows"]}, after)

  batch = toy.make_batch(6)._replace(label=np.float32([0, 1, 0, 2, 0, 3]))
  extra = {"shift": jnp.float32(0), "rows": jnp.int32(0)}
  outer = meta.m3s(loss, no_mask, tasks=3, inner_optimizer=optax.sgd(0.0))
  params = {"theta": jnp.float32(5.0)}
  (value, aux), grads = jax.value_and_grad(outer, has_aux=True)(
    params, batch, jax.random.key(0), extra
  )
  errors = np.array([5 - 1 - 0, 5 - 2 - 5, 5 - 3 - 5])
  np.testing.assert_allclose(value, np.mean(errors**2))
  np.testing.assert_allclose(grads["theta"], np.mean(2 * errors), rtol=1e-6)
  assert aux.extra["rows"] == 135
  np.testing.assert_allclose(aux.metrics["shift"], 10 / 3, rtol=1e-6)
  np.testing.assert_allclose(aux.metrics["rows"], (0 + 1 + 13) / 3, rtol=1e-6)
  np.testing.assert_allclose(aux.metrics["support_loss"], (5**2 + 0 + 0) / 3, rtol=1e-6)


def test_more_tasks_are_no_larger_program():
  params, extra = toy.init(jax.random.key(0), toy.SPEC)

  def size(tasks):
    loss = meta.m3s(toy.loss, masking.span(0.5), tasks=tasks, order="second")
    args = params, toy.make_batch(8 * tasks), jax.random.key(0), extra
    return str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(*args)).count(" = ")

  assert size(2) == size(5)


def _products(settings):
  """Matrix products in the program of a second-order meta-gradient."""
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  loss = meta.m3s(toy.loss, no_mask, order="second", **{"inner_steps": 3, **settings})
  args = params, toy.make_batch(8), jax.random.key(0), extra
  lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(*args)
  return lowered.as_text().count("dot_general "), lowered.compile()(*args)[0]


@pytest.mark.parametrize("mode", meta.MODES)
def test_remat_trades_products_for_memory_and_changes_no_gradient(mode):
  policy = jax.checkpoint_policies.dots_saveable
  counts, grads = zip(
    *(_products(dict(mode=mode, remat=r)) for r in ("steps", "none", "dots_saveable", policy)),
    strict=True,
  )
  assert counts[1] < counts[0]
  assert counts[2] == counts[3] == counts[1]
  for other in grads[1:]:
    chex.assert_trees_all_close(grads[0], other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", meta.MODES)
def test_a_single_inner_step_is_computed_once(mode):
  policies = "steps", "none", jax.checkpoint_policies.nothing_saveable
  counts = [_products(dict(mode=mode, remat=r, inner_steps=1))[0] for r in policies]
  assert counts[0] == counts[1] < counts[2]


def test_mixed_mode_keeps_the_gradients_of_a_nonlinear_optimizer():
  """Adam's backward pass reads them: they must not be computed a third time."""
  sgd, adam = (optim.make(name=n, learning_rate=0.1, differentiable=True) for n in ("sgd", "adam"))
  counts = [_products(dict(mode="mixed", inner_optimizer=o))[0] for o in (sgd, adam)]
  assert counts[0] == counts[1]


def test_what_the_inner_loop_does_not_train_stays():
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  adapted, losses = meta.adapt(
    toy.loss,
    no_mask,
    params,
    toy.make_batch(8),
    jax.random.key(0),
    extra,
    inner_steps=5,
    optimizer=optax.sgd(0.1),
    inner_trains="^head",
  )
  chex.assert_trees_all_equal(adapted["encoder"], params["encoder"])
  assert (adapted["head"]["kernel"] != params["head"]["kernel"]).all()
  assert losses.shape == (5,)
  assert losses[-1] < losses[0]
  with pytest.raises(ValueError, match="no parameter path matches 'tail'"):
    meta.m3s(toy.loss, no_mask, inner_trains="tail")(
      params, toy.make_batch(8), jax.random.key(0), extra
    )


def test_an_adam_that_is_differentiated_survives_zero_gradients():
  def loss(params, batch, key, extra):  # no gradient at all for "idle"
    value, aux = quadratic(params, batch, key, extra)
    return value + 0.0 * params["idle"], aux

  params = {"theta": jnp.float32(1.0), "idle": jnp.float32(1.0)}
  adam = dict(name="adam", learning_rate=0.1)
  outer = meta.METHODS["m3s"](no_mask, optimizer=adam, order="second").wrap(loss, None, {})
  grads = jax.grad(outer, has_aux=True)(params, labelled(0.0, 1.0), jax.random.key(0), {})[0]
  chex.assert_tree_all_finite(grads)
  # one that is not differentiated is plain Adam, at small gradients too
  plain = meta.m3s(quadratic, no_mask, inner_optimizer=optim.make(**adam))
  ours = meta.METHODS["m3s"](no_mask, optimizer=adam).wrap(quadratic, None, {})
  step = {"theta": jnp.float32(0.0)}, labelled(1e-8, 1.0), jax.random.key(0), {}
  assert ours(*step)[0] == plain(*step)[0]


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


@jax.custom_vjp
def square(x):
  """Its gradient is a loop of unknown length, which no one differentiates in reverse mode."""
  return x * x


def _square_backward(x, d):
  steps = jnp.where(x.ravel()[0] > 1e9, 3, 2)
  return (jax.lax.fori_loop(0, steps, lambda _, sum: sum + x * d, jnp.zeros_like(x)),)


square.defvjp(lambda x: (x * x, x), _square_backward)


@pytest.mark.parametrize("remat", ["steps", "none"])
@pytest.mark.parametrize("trains", ["", "^a"])
def test_mixed_mode_differentiates_no_gradient_in_reverse_mode(trains, remat):
  """By no parameter, also of those that the inner steps leave alone."""
  a, b = jax.random.normal(jax.random.key(1), (2, toy.SHAPES["text"][1], 3))
  params = {"a": a, "b": b}

  def meta_gradient(square, mode):
    def loss(params, batch, key, extra):
      del key
      x = batch.text.x.mean(1)
      hidden = square(x @ params["a"]) * jnp.tanh(square(x @ params["b"]))
      return jnp.mean((hidden.sum(1) - batch.label) ** 2), types.Aux({}, extra)

    settings = dict(inner_steps=2, inner_optimizer=optax.sgd(0.1), order="second")
    outer = meta.m3s(loss, no_mask, mode=mode, inner_trains=trains, remat=remat, **settings)
    return jax.grad(outer, has_aux=True)(params, toy.make_batch(8), jax.random.key(0), {})[0]

  expected = meta_gradient(lambda x: x * x, "reverse")
  chex.assert_trees_all_close(meta_gradient(square, "mixed"), expected, rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match="Reverse-mode differentiation"):
    meta_gradient(square, "reverse")


@pytest.mark.parametrize("order", meta.ORDERS)
def test_only_the_second_order_differentiates_the_inner_loop(order):
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  loss = meta.m3s(toy.loss, masking.span(0.5), inner_steps=4, order=order)
  jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(
    params, toy.make_batch(8), jax.random.key(0), extra
  )
  backward = any(e.params["reverse"] for e in jaxprs.named(jaxpr.jaxpr, "scan"))
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
  weights = np.random.default_rng(0).normal(size=(16, toy.SHAPES["text"][0])).astype(np.float32)

  def loss(params, batch, key, extra):
    del key
    value = jnp.sum(jnp.where(batch.text.seen[..., 0], weights, 0.0))
    return value + params["theta"], types.Aux({"mask": value}, extra)

  batch = toy.make_batch(32)
  batch = jax.tree.map(lambda a: np.concatenate([a[:16], a[:16]]), batch)  # X1 == X2
  key = jax.random.key(3)
  keys = meta.meta_keys(key, 3, fresh)
  params = {"theta": jnp.float32(0)}
  support, _ = meta.split_support_query(batch)
  mask = masking.span(0.5)
  still = dict(optimizer=optax.sgd(0.0), **({"fresh_masks": True} if fresh else {}))
  _, losses = meta.adapt(loss, mask, params, support, keys, {}, **still)
  _, aux = meta.m3s(loss, mask, inner_steps=3, fresh_masks=fresh)(params, batch, key, {})
  _, same = meta.adapt(loss, mask, params, support, key, {}, inner_steps=3, **still)
  np.testing.assert_array_equal(losses, same)  # one key stands for those that are split from it
  assert (len(set(np.asarray(losses).tolist())) > 1) == fresh
  assert aux.metrics["mask"] not in np.asarray(losses)


GROUPED = dict(name="sgd", learning_rate=0.1, groups=[("^head", dict(learning_rate=0.02))])


def test_learned_rates_start_as_the_inner_optimizers_and_are_trained():
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  batch, key = toy.make_batch(8), jax.random.key(2)
  mask = masking.span(0.5)

  def gradient(**settings):
    method = meta.METHODS["m3s"](mask, optimizer=GROUPED, inner_steps=2, **settings)
    rates = {} if method.init is None else method.init(jax.random.key(0), params)

    def loss(params, rates):
      wrapped = method.wrap(toy.loss, jax.random.key(9), rates, hessian="symmetric")
      return wrapped(params, batch, key, extra)[0]

    return rates, *jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, rates)

  none, plain_value, (plain, _) = gradient()
  rates, value, (grads, rate_grads) = gradient(inner_rates="learned")
  assert none == {}
  expected = {"encoder": {"kernel": 0.1}, "head": {"kernel": 0.02, "bias": 0.02}}
  chex.assert_trees_all_close(rates, jax.tree.map(jnp.float32, expected))
  np.testing.assert_allclose(value, plain_value, rtol=1e-5)
  chex.assert_trees_all_close(grads, plain, rtol=1e-4, atol=1e-6)
  assert all(g != 0 for g in jax.tree.leaves(rate_grads))


def test_rates_multiply_the_updates_of_any_optimizer():
  params = {"a": jnp.float32(1.0), "b": jnp.float32(2.0)}
  rates = {"a": jnp.float32(0.1), "b": jnp.float32(-0.3)}

  def loss(params, batch, key, extra):
    return params["a"] ** 2 + 3 * params["b"], types.Aux({}, extra)

  adapted, _ = meta.adapt(
    loss,
    no_mask,
    params,
    labelled(0.0, 0.0),
    jax.random.key(0),
    {},
    inner_steps=2,
    optimizer=optax.sgd(1.0, momentum=0.5),
    inner_rates=rates,
  )
  first = 1 - 0.1 * 2
  expected = {"a": first - 0.1 * (2 * first + 0.5 * 2), "b": 2 + 0.3 * (3 + 4.5)}
  chex.assert_trees_all_close(adapted, jax.tree.map(jnp.float32, expected), rtol=1e-6)


def test_methods_by_name():
  mask = masking.span(0.5)
  methods = {name: make(mask) for name, make in meta.METHODS.items()}
  assert {name: m.title for name, m in methods.items()} == {
    "orig": "ORIG",
    "spl": "SPL-TRN",
    "m3s": "M3S",
  }
  assert [m.draws for m in methods.values()] == [1, 1, 2]
  assert all(m.init is None for m in methods.values())
  assert meta.METHODS["m3s"](mask, tasks=3).draws == 6
  settings = registry.settings_of(meta.METHODS["m3s"])
  assert list(settings)[1:] == [
    "inner_steps",
    "optimizer",
    "order",
    "fresh_masks",
    "support_rows",
    "tasks",
    "inner_rates",
    "inner_trains",
    "remat",
    "support_rate",
    "hard_masks",
    "hard_by",
    "at_rate",
  ]
  # what a method draws hangs on the run's key (orig) or on the step's (spl)
  run, one, two = jax.random.split(jax.random.key(0), 3)
  for name, fixed in (("orig", True), ("spl", False)):
    seen = [
      seen_of(lambda loss, name=name: methods[name].wrap(loss, run, {}), key) for key in (one, two)
    ]
    assert (seen[0] == seen[1]).all() == fixed
  other = seen_of(lambda loss: methods["orig"].wrap(loss, one, {}), one)
  assert (other != seen_of(lambda loss: methods["orig"].wrap(loss, run, {}), one)).any()


def test_every_setting_of_the_m3s_method_reaches_m3s():
  """Each setting changes the meta-gradient as it does in `m3s`."""
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  batch, key = toy.make_batch(8), jax.random.key(2)
  mask = masking.span((0.3, 0.6))
  same = dict(
    inner_steps=2,
    order="second",
    fresh_masks=True,
    support_rows=1,
    tasks=2,
    inner_trains="^head",
    remat="none",
  )
  method = meta.METHODS["m3s"](mask, **same, optimizer=dict(name="adam", learning_rate=0.1))
  inner = optim.make(name="adam", learning_rate=0.1, differentiable=True)
  loss = meta.m3s(toy.loss, mask, **same, inner_optimizer=inner)
  wrapped = method.wrap(toy.loss, jax.random.key(0), {})
  grads = [jax.grad(f, has_aux=True)(params, batch, key, extra)[0] for f in (wrapped, loss)]
  chex.assert_trees_all_equal(*grads)


def test_the_hessian_mode_is_the_losss_own():
  """With reversed gradients the modes differ; "reverse" is the right one and the default."""

  def loss(params, batch, key, extra):
    return layers.reverse_gradient(params["a"] ** 2) * params["b"], types.Aux({}, extra)

  params = {"a": jnp.float32(1.5), "b": jnp.float32(0.5)}
  method = meta.METHODS["m3s"](no_mask, order="second", optimizer=dict(name="sgd"))

  def gradient(make):
    step = labelled(0.0, 1.0), jax.random.key(0), {}
    return float(jax.grad(make(loss), has_aux=True)(params, *step)[0]["a"])

  by_mode = {
    mode: gradient(
      functools.partial(
        meta.m3s, mask=no_mask, order="second", mode=mode, inner_optimizer=optax.sgd(1e-3)
      )
    )
    for mode in meta.MODES
  }
  assert by_mode["reverse"] != by_mode["mixed"]
  key = jax.random.key(0)
  assert gradient(lambda f: method.wrap(f, key, {})) == by_mode["reverse"]
  assert gradient(lambda f: method.wrap(f, key, {}, hessian="symmetric")) == by_mode["mixed"]


@pytest.fixture
def as_parity_runs():
  """The recorded arrays mix precisions, and so does the code that replays them."""
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  jax.config.update("jax_numpy_rank_promotion", "allow")
  yield
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_numpy_rank_promotion", "raise")


def test_a_file_of_7_support_and_5_query_rows_is_replayed(shared, as_parity_runs):
  """The recorded 6 + 6 rows cut anew, and the algorithm written out once more for them."""
  z = {
    key: value
    for key, value in parity.read(shared("parity/m3s.npz")).items()
    if not key.startswith("f")
  }
  for key in [key for key in z if key.startswith(("input/X1", "mask/feat/X1"))]:
    query = z[re.sub(r"X1(_step\d)?", "X2", key)]
    if np.ndim(query):
      z[key] = np.concatenate([z[key], query[:1]])
  for key in [key for key in z if key.startswith(("input/X2", "mask/feat/X2"))]:
    z[key] = z[key][1:] if np.ndim(z[key]) else z[key]
  with jax.enable_x64(True):
    params = golden._params(z, np.float64)
    loss = golden._loss_of("feat")

    def seen(name, mask):
      batch = golden._batch(z, "feat", name, 0, np.float64)
      masks = {of: jnp.asarray(z[f"mask/feat/{mask}/{of}"]) for of in types.MODALITIES}
      return batch._replace(info=masks)

    query = seen("X2", "X2")
    supports = [seen("X1", mask) for mask in ("X1_step0", "X1_step1")]
    supports = jax.tree.map(lambda *leaves: jnp.stack(leaves), *supports)

    def inner(params):
      def step(params, support):
        value, grads = jax.value_and_grad(lambda p: loss(p, support, None, {})[0])(params)
        return jax.tree.map(lambda p, g: p - 0.15 * g, params, grads), value

      return jax.lax.scan(step, params, supports)

    def outer(params):
      return loss(params, query, None, {})[0]

    @jax.jit
    def everything(params):
      adapted, losses = inner(params)
      second = jax.grad(lambda p: outer(inner(p)[0]))(params)
      return adapted, losses, jax.value_and_grad(outer)(adapted), second

    adapted, losses, (value, first), second = everything(params)
    found = {
      "theta_K": golden._flat(z, adapted),
      "inner_losses": losses,
      "outer_loss": value,
      "fo_grad": golden._flat(z, first),
      "so_grad": golden._flat(z, second),
    }
    for order in ("fo", "so"):
      grads, theta = found[f"{order}_grad"], golden._flat(z, params)
      found[f"after_sgd_{order}"] = theta - 0.05 * grads
      found[f"after_adam_{order}"] = theta - 1e-3 * grads / (abs(grads) + 1e-8)
    z.update({f"f64/feat/K2_freshmask/{key}": np.asarray(found[key]) for key in found})
  compared = list(golden.compare(z))
  assert len(compared) == 9
  for _, name, ours, recorded in compared:
    np.testing.assert_allclose(ours, recorded, rtol=1e-7, atol=1e-10, err_msg=name)


def test_wrong_use_is_refused():
  for wrong in (
    dict(order="third"),
    dict(inner_steps=0),
    dict(tasks=0),
    dict(remat="all"),
  ):
    with pytest.raises(types.UsageError, match=next(iter(wrong))):
      meta.m3s(quadratic, no_mask, **wrong)
    with pytest.raises(types.UsageError, match=next(iter(wrong))):
      meta.METHODS["m3s"](no_mask, **wrong)
  with pytest.raises(types.UsageError, match="mode"):
    meta.m3s(quadratic, no_mask, mode="forward")
  with pytest.raises(types.UsageError, match="mode"):
    meta.adapt(
      quadratic, no_mask, {"theta": 0.0}, labelled(0, 0), jax.random.key(0), {}, mode="forward"
    )
  with pytest.raises(types.UsageError, match="inner_rates is 'fixed'"):
    meta.METHODS["m3s"](no_mask, inner_rates="fixed")
  schedule = dict(learning_rate=dict(name="cosine", peak=0.1))
  with pytest.raises(types.UsageError, match="schedule"):
    meta.METHODS["m3s"](no_mask, inner_rates="learned", optimizer=schedule)


@pytest.mark.parametrize(
  ("rows", "settings"),
  [
    (5, dict()),
    (6, dict(tasks=2)),
    (8, dict(tasks=3, support_rows=1)),
    (8, dict(support_rows=8)),
    (8, dict(support_rows=0)),
    (8, dict(tasks=2, support_rows=4)),
  ],
)
def test_rows_that_make_no_tasks_are_refused(rows, settings):
  params = {"theta": jnp.float32(0.0)}
  named = f"rows={rows} .*tasks={settings.get('tasks', 1)}"
  with pytest.raises(types.UsageError, match=named) as error:
    meta.m3s(quadratic, no_mask, **settings)(params, toy.make_batch(rows), jax.random.key(0), {})
  assert f"support_rows={settings.get('support_rows')}" in str(error.value)


def test_a_pair_of_sets_that_make_no_tasks_is_refused():
  pair = toy.make_batch(4), toy.make_batch(3)
  with pytest.raises(types.UsageError, match="rows=3, which do not make tasks=2"):
    meta.m3s(quadratic, no_mask, tasks=2)({"theta": jnp.float32(0)}, pair, jax.random.key(0), {})
