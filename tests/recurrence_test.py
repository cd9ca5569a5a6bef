"""The LSTM's loop and its kernel against the plain scan, and what they save."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprs
import models_test
from mmjax import masking, meta, models, parallel, recurrence
from mmjax.recurrence import kernel, sweep

B, D, H = 4, 3, 5


def draw(steps, longest=None, rows=B):
  """Sequences of several lengths, weights of two directions, and what their outputs weigh."""
  random, longest = np.random.default_rng(steps), longest or steps
  x = random.normal(size=(steps, rows, D))
  valid = np.arange(steps)[:, None] < np.resize([longest, longest // 2, 1, 0], rows)
  weights = [
    tuple(random.normal(size=shape) * 0.5 for shape in ((D, 4 * H), (H, 4 * H), (4 * H,)))
    for _ in range(2)
  ]
  return x, valid, weights, random.normal(size=(steps, rows, H)), random.normal(size=(rows, H))


def make_loss(case, valid, of_outputs, of_final):
  def weigh(outputs, final):
    outputs, final = (a.astype(jnp.result_type(float)) for a in (outputs, final))
    return jnp.sum(jnp.sin(outputs) * of_outputs) + jnp.sum(final**2 * of_final)

  def loss(x, weights):
    if case != "both":
      return weigh(*recurrence.lstm(x, valid, *weights[0], reverse=case == "backward"))
    outputs, finals = recurrence.bilstm(x, valid, *weights)
    return weigh(outputs[0], finals[0]) + weigh(jnp.cos(outputs[1]), finals[1])

  return loss


def all_orders(loss):
  """(x, weights) -> value, gradient, both kinds of second derivatives."""
  gradient = jax.grad(loss, (0, 1))

  def all_of(x, weights):
    def of_gradient(x, weights):
      return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(x, weights)))

    forward_over_reverse = jax.jvp(gradient, (x, weights), (x, weights))[1]
    return (
      jax.value_and_grad(loss, (0, 1))(x, weights),
      forward_over_reverse,
      jax.grad(of_gradient, (0, 1))(x, weights),
    )

  return all_of


def assert_close(found, expected):
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  ("case", "steps", "longest"),
  [("forward", 1, 1), ("forward", 13, 13), ("backward", 13, 4), ("both", 13, 4)],
)
def test_it_equals_the_plain_scan_to_the_second_derivative(case, steps, longest):
  x, valid, weights, *scales = draw(steps, longest)
  all_of = all_orders(make_loss(case, valid, *scales))
  with jax.enable_x64(True):
    found = jax.jit(all_of)(x, weights)
    with recurrence.plain():
      expected = jax.jit(lambda *args: all_of(*args))(x, weights)
  assert_close(found, expected)


def sigmoid(a):
  return 1 / (1 + np.exp(-a))


def lstm_by_hand(x, valid, w_ih, w_hh, bias, reverse=False):
  h, c, outputs = np.zeros((B, H)), np.zeros((B, H)), np.zeros((len(x), B, H))
  for t in range(len(x))[:: -1 if reverse else 1]:
    i, f, g, o = np.split(x[t] @ w_ih + h @ w_hh + bias, 4, -1)
    now = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    on = valid[t][:, None]
    h, c = np.where(on, sigmoid(o) * np.tanh(now), h), np.where(on, now, c)
    outputs[t] = np.where(on, h, 0)
  return outputs, h


def gru_by_hand(x, valid, w_ih, w_hh, b_ih, b_hh, reverse=False):
  h, outputs = np.zeros((B, H)), np.zeros((*valid.shape, H))
  for t in range(x.shape[1])[:: -1 if reverse else 1]:
    (r, z, n), (h_r, h_z, h_n) = (
      np.split(a, 3, -1) for a in (x[:, t] @ w_ih + b_ih, h @ w_hh + b_hh)
    )
    z, on = sigmoid(z + h_z), valid[:, t, None]
    h = np.where(on, (1 - z) * np.tanh(n + sigmoid(r + h_r) * h_n) + z * h, h)
    outputs[:, t] = np.where(on, h, 0)
  return outputs


@pytest.mark.parametrize("plain", [False, True])
def test_it_equals_loops_written_out(plain):
  x, valid, weights, *_ = draw(13)
  random = np.random.default_rng(2)
  of_gru = [random.normal(size=shape) for shape in ((D, 3 * H), (H, 3 * H), (3 * H,), (3 * H,))]
  rows = x.swapaxes(0, 1), valid.T

  def everything():
    return (
      recurrence.lstm(x, valid, *weights[0]),
      recurrence.lstm(x, valid, *weights[0], reverse=True),
      recurrence.bilstm(x, valid, *weights),
      [recurrence.gru(*rows, *of_gru), recurrence.gru(*rows, *of_gru, reverse=True)],
    )

  with jax.enable_x64(True), recurrence.plain() if plain else contextlib.nullcontext():
    found = jax.jit(everything)()
  ahead, back = (lstm_by_hand(x, valid, *w, r) for w, r in zip(weights, (False, True), strict=True))
  expected = (
    ahead,
    lstm_by_hand(x, valid, *weights[0], reverse=True),
    list(zip(ahead, back, strict=True)),
    [gru_by_hand(*rows, *of_gru, reverse=reverse) for reverse in (False, True)],
  )
  assert_close(found, expected)


def test_features_of_half_precision_are_computed_in_that_of_the_weights():
  x, valid, weights, *_ = draw(7)
  half, weights = np.float16(x), [np.float32(w) for w in weights[0]]
  lstm = jax.jit(recurrence.lstm)
  found, expected = (lstm(a, valid, *weights) for a in (half, np.float32(half)))
  assert found[0].dtype == np.float32
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
  ("dtype", "elsewhere", "kernels"),
  [(np.float32, False, False), (np.float32, True, True), (np.float64, True, False)],
)
def test_kernels_are_traced_where_they_may_run(dtype, elsewhere, kernels):
  x, valid, weights, *_ = draw(3)
  with jax.enable_x64(True), recurrence.portable() if elsewhere else contextlib.nullcontext():
    trace = jax.make_jaxpr(lambda *args: recurrence.lstm(*args))
    jaxpr = trace(dtype(x), valid, *map(dtype, weights[0]))
  assert bool(jaxprs.named(jaxpr.jaxpr, "sweep")) == kernels


@pytest.mark.parametrize(("hidden", "kernels"), [(256, 2), (257, 0)])
def test_what_is_too_wide_for_a_kernel_is_a_loop_without_conditions(hidden, kernels):
  """Of which each would make a GPU wait for its host: only what is for a CPU skips padding."""
  shapes = (3, B, D), (D, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,)
  x, *weights = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
  with recurrence.portable():
    jaxpr = jax.make_jaxpr(recurrence.lstm)(x, jax.ShapeDtypeStruct((3, B), bool), *weights).jaxpr
  assert len(jaxprs.named(jaxpr, "sweep")) == kernels
  by_platform, *skipping = jaxprs.named(jaxpr, "cond")
  assert len(by_platform.params["branches"]) == 3
  assert len(skipping) == 1
  assert len(jaxprs.named(jaxpr, "scan")) == 2 * (3 - kernels)  # over chunks, and over steps


def test_a_loop_that_skips_nothing_computes_the_same(monkeypatch):
  def run(loop, kernel_of, hidden, dtype, *args):
    del kernel_of, hidden, dtype
    return loop(*args, skip=False)

  x, valid, weights, *scales = draw(13, 4)
  all_of = all_orders(make_loss("both", valid, *scales))
  with jax.enable_x64(True):
    expected = jax.jit(all_of)(x, weights)
    monkeypatch.setattr(recurrence, "_by_platform", run)
    found = jax.jit(lambda *args: all_of(*args))(x, weights)
  assert_close(found, expected)


@pytest.mark.parametrize("name", ["plain", "portable"])
def test_what_is_traced_inside_ends_with_the_block(name):
  variable = getattr(recurrence, f"_{name.upper()}")
  with pytest.raises(KeyError), getattr(recurrence, name)():
    assert variable.get() is True
    raise KeyError
  assert variable.get() is False


def test_devices_are_told_where_the_rows_are(monkeypatch):
  """Two devices, played by two halves of the rows."""

  def by_rows(function, in_axes, out_axes, rows):
    def halves(*args):
      def half(n):
        cut = lambda a, axis: a if axis is None else jnp.split(a, 2, axis)[n]  # noqa: E731
        return function(*map(cut, args, in_axes))

      return tuple(map(jnp.concatenate, zip(half(0), half(1), strict=True), out_axes))

    assert rows == B
    return halves

  x, valid, weights, *_ = draw(7)

  def both():
    return recurrence.lstm(x, valid, *weights[0]), recurrence.bilstm(x, valid, *weights)

  with jax.enable_x64(True):
    expected = jax.jit(both)()
    monkeypatch.setattr(parallel, "by_rows", by_rows)
    found = jax.jit(lambda: both())()
  assert_close(found, expected)


def test_chunks_and_their_number_grow_alike():
  sizes = [recurrence._chunk_size(steps) for steps in (1, 2, 3, 13, 50, 400)]
  assert sizes == [1, 2, 3, 5, 10, 29]


@pytest.fixture(params=list(kernel.WIDEST))
def interpreted(request, monkeypatch):
  """Runs the kernel, with the blocks of a target, in Pallas' interpreter."""

  def run(loop, kernel_of, hidden, dtype, *args):
    del loop, hidden, dtype
    return kernel_of(*args, target=request.param, interpret=True)

  monkeypatch.setattr(recurrence, "_by_platform", run)
  return request.param


@pytest.mark.parametrize(
  ("interpreted", "case", "resident"),
  [("cuda", "both", False), ("tpu", "backward", True)],
  indirect=["interpreted"],
)
def test_a_kernel_equals_the_plain_scan_to_the_second_derivative(
  case, interpreted, resident, monkeypatch
):
  if not resident:  # as large weights are not, which are read in blocks
    monkeypatch.setattr(sweep, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(sweep, "BLOCK", sweep.LEAST // 2)
  x, valid, weights, *scales = draw(13, 9)
  all_of = all_orders(make_loss(case, valid, *scales))
  with jax.enable_x64(True):
    found = jax.jit(all_of)(x, weights)
    with recurrence.plain():
      expected = jax.jit(lambda *args: all_of(*args))(x, weights)
  assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", ["cuda"], indirect=True)
def test_a_kernel_in_a_loss_with_a_meta_gradient_of_its_own(interpreted):
  """Second order around that: scans and checkpoints that hold kernels are differentiated again."""
  x, valid, weights, *scales = draw(2)
  loss = make_loss("both", valid, *scales)

  def adapted_loss(x, weights):
    def step(weights, _):
      gradient = jax.jvp(jax.grad(loss, 1), (x, weights), (x, weights))[1]
      return jax.tree.map(lambda w, d: w - 0.01 * d, weights, gradient), None

    return loss(x, jax.lax.scan(jax.checkpoint(step), weights, length=2)[0])

  def second_order(x, weights):
    return jax.jvp(jax.grad(adapted_loss, (0, 1)), (x, weights), (x, weights))

  with jax.enable_x64(True):
    found = jax.jit(second_order)(x, weights)
    with recurrence.plain():
      expected = jax.jit(lambda *args: second_order(*args))(x, weights)
  assert_close(found, expected)


@pytest.mark.parametrize(
  ("interpreted", "case"), [("cuda", "backward"), ("tpu", "both")], indirect=["interpreted"]
)
def test_a_gru_of_kernels_equals_its_plain_scan(interpreted, case, monkeypatch):
  x, valid, _, of_outputs, _ = draw(13, 9)
  random = np.random.default_rng(1)
  shapes = (D, 3 * H), (H, 3 * H), (3 * H,), (3 * H,)
  weights = [tuple(random.normal(size=shape) * 0.5 for shape in shapes) for _ in range(2)]

  def loss(x, weights):
    rows = x.swapaxes(0, 1), valid.T
    if case == "both":
      ahead, back = recurrence.bigru(*rows, *weights)
    else:
      back = recurrence.gru(*rows, *weights[1], reverse=True)
      ahead = jnp.zeros_like(back)
    return jnp.sum((jnp.cos(2 * ahead) + jnp.sin(back)) * of_outputs.swapaxes(0, 1))

  all_of = all_orders(loss)
  with jax.enable_x64(True):
    expected = jax.jit(all_of)(x, weights)
    monkeypatch.setattr(recurrence, "_accelerated", lambda *_: True)
    found = jax.jit(lambda *args: all_of(*args))(x, weights)
  assert_close(found, expected)
  kernels = jaxprs.named(jax.make_jaxpr(lambda *args: loss(*args))(x, weights).jaxpr, "sweep")
  assert len(kernels) == 1


def draw_decoder(steps=19, length=7, rows=B):
  """Arguments of `attend_and_decode`; nothing may be attended to in the last row."""
  random = np.random.default_rng(3)
  allowed = np.arange(length) < np.resize([length, 2, 1, 0], (rows, 1))
  shapes = (steps, rows, 8 * H), (rows, length, H), (rows, length, H)
  others = (rows, H), (H, H), (H, 1), (H, 8 * H)
  given, states, keys, *others = (random.normal(size=shape) for shape in (*shapes, *others))
  return given, states, keys, allowed, *others


def of_decoder(allowed):
  def loss(x, weights):
    given, states, keys, state = x
    state, context = recurrence.attend_and_decode(given, states, keys, allowed, state, *weights)
    state, context = (a.astype(jnp.result_type(float)) for a in (state, context))
    return jnp.sum(jnp.sin(3 * state)) + jnp.sum(jnp.cos(context))

  return loss


def test_a_decoder_of_kernels_equals_its_plain_scan(interpreted, monkeypatch):
  """For a TPU of two seeds at once, of which only some arguments differ."""
  *x, allowed, state, w_query, v, w_context = draw_decoder()
  args, all_of = ((*x, state), (w_query, v, w_context)), all_orders(of_decoder(allowed))
  if interpreted == "tpu":
    seeds = w_query, np.stack([v, -v]), np.stack([w_context, w_context / 2])
    args, all_of = (args[0], seeds), jax.vmap(all_of, (None, (None, 0, 0)))
  with jax.enable_x64(True):
    expected = jax.jit(all_of)(*args)
    monkeypatch.setattr(recurrence, "_accelerated", lambda *_: True)
    found = jax.jit(lambda *args: all_of(*args))(*args)
  assert_close(found, expected)


def test_a_decoder_of_halves_sums_up_in_float32(monkeypatch):
  monkeypatch.setattr(recurrence, "_accelerated", lambda *_: True)
  with recurrence.portable():
    *x, allowed, state, w_query, v, w_context = draw_decoder(rows=3)
    args = (*x, state), (w_query, v, w_context)
    halves = jax.tree.map(lambda a: jnp.asarray(a / 2, jnp.bfloat16), args)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), halves)
    found = jax.jit(jax.grad(of_decoder(allowed), (0, 1)))(*halves)
  with recurrence.plain():
    expected = jax.jit(jax.grad(of_decoder(allowed), (0, 1)))(*exact)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert ours.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(ours, np.float32) - theirs)
    assert error < 0.02 * np.linalg.norm(theirs) + 1e-6


def test_a_kernel_takes_seeds_as_an_axis_and_batches_that_no_tile_divides(interpreted):
  x, valid, weights, *scales = draw(7, rows=19)
  loss = make_loss("both", valid, *scales)

  def second_order(scale, x):
    gradient = jax.grad(lambda w: loss(x, jax.tree.map(lambda a: scale * a, w)))
    return jax.jvp(gradient, (weights,), (weights,))

  scales, seeds = np.array([0.5, 1.5]), np.stack([x, x[::-1]])
  with jax.enable_x64(True):
    found = jax.jit(jax.vmap(second_order))(scales, seeds)
    with recurrence.plain():
      expected = jax.jit(jax.vmap(lambda *args: second_order(*args)))(scales, seeds)
  assert_close(found, expected)


def test_nothing_of_what_padding_holds_reaches_a_kernel(interpreted):
  x, valid, weights, *scales = draw(7)
  gradient = jax.jit(jax.grad(make_loss("both", valid, *scales), (0, 1)))
  found = gradient(np.where(valid[:, :, None], x, np.nan), weights)
  jax.tree.map(np.testing.assert_array_equal, found, gradient(x, weights))


def test_a_kernel_of_halves_sums_up_in_float32(interpreted):
  x, valid, weights, *scales = draw(40)
  loss = make_loss("both", valid, *scales)
  halves = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (x, weights))
  exact = jax.tree.map(lambda a: a.astype(jnp.float32), halves)
  found = jax.jit(jax.grad(loss, (0, 1)))(*halves)
  with recurrence.plain():
    expected = jax.jit(jax.grad(lambda *args: loss(*args), (0, 1)))(*exact)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert ours.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(ours, np.float32) - theirs)
    assert error < 0.01 * np.linalg.norm(theirs) + 1e-6


def test_a_program_for_every_platform_is_the_loop_on_a_cpu():
  x, valid, weights, *scales = draw(13)
  all_of = all_orders(make_loss("both", valid, *scales))
  weights = jax.tree.map(np.float32, weights)
  found = jax.jit(all_of)(np.float32(x), weights)
  with recurrence.portable():
    program = jax.jit(lambda *args: all_of(*args)).lower(np.float32(x), weights)
  assert "pallas" not in program.as_text()
  jax.tree.map(np.testing.assert_array_equal, program.compile()(np.float32(x), weights), found)


def test_seeds_add_no_kernels_to_a_training_step():
  """Vmapped, it is as many kernels and products: each kernel's grid has one more axis."""
  system = models.MODELS["self_mm"](**models_test.SETTINGS["self_mm"])
  spec = models_test.make_spec(False, 0)
  batch = jax.tree.map(lambda a: a[:4], models_test.make_batch(spec))
  loss = meta.m3s(system.loss, masking.span(0.3), order="first")

  def step(key, start, batch):
    params, extra = start
    return jax.grad(loss, has_aux=True)(params, batch, key, extra)

  keys = jax.random.split(jax.random.key(0), 3)
  starts = jax.eval_shape(jax.vmap(lambda key: system.init(key, spec)), keys)
  with recurrence.portable():
    start = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), starts)
    one = jax.make_jaxpr(step)(keys[0], start, batch)
    three = jax.make_jaxpr(jax.vmap(step, (0, 0, None)))(keys, starts, batch)
  sweeps = jaxprs.named(one.jaxpr, "sweep")
  assert len(sweeps) == 16  # two passes, forth and back, of two LSTMs, for two kinds of devices
  for name in ("sweep", "dot_general", "while", "cond"):
    assert len(jaxprs.named(three.jaxpr, name)) == len(jaxprs.named(one.jaxpr, name))

  def grid(equation):
    run = functools.partial(equation.primitive.impl, **equation.params)
    traced = jax.make_jaxpr(run)(*(v.aval for v in equation.invars))
    (kernel,) = jaxprs.named(traced.jaxpr, "pallas_call")
    return kernel.params["grid_mapping"].grid

  grids = [[grid(sweep) for sweep in jaxprs.named(t.jaxpr, "sweep")] for t in (one, three)]
  assert grids[1] == [(3, *grid) for grid in grids[0]]


@pytest.mark.parametrize("case", ["forward", "backward", "both"])
def test_chunks_of_padding_alone_are_not_computed(case):
  x, valid, weights, *scales = draw(13, longest=5)  # in chunks of five
  gradient = jax.jit(jax.grad(make_loss(case, valid, *scales), (0, 1)))
  found = gradient(np.where(np.arange(13)[:, None, None] < 5, x, np.nan), weights)
  jax.tree.map(np.testing.assert_array_equal, found, gradient(x, weights))


def test_a_gradient_keeps_states_and_not_gates():
  x, valid, weights, *scales = draw(400)
  loss = make_loss("forward", valid, *scales)

  def temporaries():
    gradient = jax.jit(lambda x, weights: jax.grad(loss, 1)(x, weights))
    memory = gradient.lower(x, weights).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes

  ours = temporaries()
  with recurrence.plain():
    plain = temporaries()
  assert ours < plain / 2


def test_a_linearization_keeps_what_a_recurrence_is_given_and_gives():
  """Nothing of the chunks in which it runs: a CPU is slower for it."""
  x, valid, (weights, _), *_ = draw(50)
  gradient = jax.grad(lambda weights: jnp.sum(recurrence.lstm(x, valid, *weights)[0] ** 2))
  _, along = jax.linearize(gradient, tuple(map(jnp.asarray, weights)))
  shapes = [a.shape for a in jax.tree.leaves(along)]
  chunks = 50 // recurrence._chunk_size(50)
  assert chunks > 1 and (50, B, H) in shapes
  assert (chunks, B, H) not in shapes  # the state between two chunks
