"""Layers against PyTorch's, with and without padding, and their derivatives."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprs
from mmjax import batched, layers, torch_import, types

LENGTHS = np.array([5, 1, 7, 3])
B, L, D, H = len(LENGTHS), LENGTHS.max(), 3, 4


@pytest.fixture
def x():
  return np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)


@pytest.fixture
def valid():
  return np.arange(L) < LENGTHS[:, None]


def init(module, *args):
  return jax.jit(module.init)(jax.random.key(0), *args)


def imported(module, torch_module, rules, *args):
  """Parameters of `module` with the weights of a PyTorch module named "m"."""
  template = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
  state = {f"m.{k}": v.detach().numpy() for k, v in torch_module.state_dict().items()}
  weights = torch_import.from_torch({"m": template}, state, rules)
  return {"params": weights["m"]}


@pytest.mark.parametrize("packed", [True, False])
def test_bilstm_is_pytorchs(x, valid, packed):
  torch = pytest.importorskip("torch")
  reference = torch.nn.LSTM(D, H, bidirectional=True, batch_first=True)
  given, mask = torch.tensor(x, requires_grad=True), valid if packed else None
  sequence = given
  if packed:
    sequence = torch.nn.utils.rnn.pack_padded_sequence(
      given, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
    )
  outputs, (final, _) = reference(sequence)
  if packed:
    outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
  (outputs.sin().sum() + final.cos().sum()).backward()

  module = layers.BiLSTM(H)
  rules = torch_import.lstm_rules("m", "m", bidirectional=True)
  params = imported(module, reference, rules, x)

  def loss(params, x):
    outputs, finals = module.apply(params, x, mask)
    return jnp.sin(outputs).sum() + jnp.cos(jnp.stack(finals)).sum(), (outputs, finals)

  (grads, grad_x), (ours, finals) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  np.testing.assert_allclose(ours, outputs.detach(), atol=1e-6)
  np.testing.assert_allclose(jnp.stack(finals), final.detach(), atol=1e-6)
  np.testing.assert_allclose(grad_x, given.grad, atol=1e-5)
  theirs = {f"m.{name}": p.grad.numpy() for name, p in reference.named_parameters()}
  theirs = torch_import.from_torch({"m": params["params"]}, theirs, rules)["m"]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), grads["params"], theirs
  )


@pytest.mark.parametrize("reverse", [False, True])
def test_lstm_never_reads_padding(x, valid, reverse):
  module = layers.LSTM(H, reverse=reverse)
  params, apply = init(module, x), jax.jit(module.apply)
  outputs, final = apply(params, x, valid)
  other, other_final = apply(params, np.where(valid[..., None], x, 7.0), valid)
  np.testing.assert_array_equal(outputs, other)
  np.testing.assert_array_equal(final, other_final)
  assert not np.any(np.where(valid[..., None], 0, outputs))
  alone, alone_final = apply(params, x[:1, : LENGTHS[0]])
  np.testing.assert_allclose(outputs[:1, : LENGTHS[0]], alone, atol=1e-6)
  np.testing.assert_allclose(final[:1], alone_final, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("module", [layers.LSTM(H), layers.BiLSTM(H), layers.GRU(H)])
def test_recurrences_take_features_of_half_precision(x, valid, module, dtype):
  """As they take the same values in float32, the parameters' type."""
  half = jnp.asarray(x, dtype)
  params = init(module, x, valid)

  def loss(params, x):
    return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(module.apply(params, x, valid)))

  gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
  with jax.numpy_dtype_promotion("standard"):
    value, (grads, grad_x) = gradient(params, half)
  expected, (their_grads, their_grad_x) = gradient(params, half.astype(jnp.float32))
  assert value.dtype == jnp.float32 and grad_x.dtype == dtype
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(grad_x.astype(jnp.float32), their_grad_x, rtol=2 * eps, atol=2 * eps)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, their_grads)


def test_two_biases_move_apart_from_one():
  """Each of the two gets the whole gradient, as in PyTorch."""
  module = layers.LSTM(H)
  x = jnp.ones((1, 2, D))
  params = init(module, x)
  grads = jax.grad(lambda p: module.apply(p, x)[1].sum())(params)["params"]
  assert np.abs(grads["b_ih"]).max() > 0
  np.testing.assert_array_equal(grads["b_ih"], grads["b_hh"])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_pytorchs(valid, causal):
  torch = pytest.importorskip("torch")
  width, rows = 6, 5
  query, keys = np.random.default_rng(1).normal(size=(2, B, L, width)).astype(np.float32)
  query = query[:, :rows]
  mask = np.tril(np.ones((rows, L), bool)) if causal else None
  reference = torch.nn.MultiheadAttention(width, 2, batch_first=True)
  torch.nn.init.normal_(reference.in_proj_bias)
  theirs, _ = reference(
    torch.tensor(query),
    torch.tensor(keys),
    torch.tensor(keys),
    key_padding_mask=torch.tensor(~valid),
    attn_mask=None if mask is None else torch.tensor(~mask),
  )
  rules = (
    (r"m\.in_proj_(?:weight)", "m/in_kernel"),
    (r"m\.in_proj_bias", "m/in_bias"),
    (r"m\.out_proj\.weight", "m/out_kernel"),
    (r"m\.out_proj\.bias", "m/out_bias"),
  )
  module = layers.MultiHeadAttention(2)
  params = imported(module, reference, rules, query)
  ours = jax.jit(module.apply)(params, query, keys, valid=valid, mask=mask)
  np.testing.assert_allclose(ours, theirs.detach(), atol=1e-6)


def test_attention_without_any_key_stays_finite():
  x = jnp.ones((2, 3, 4))
  module = layers.MultiHeadAttention(2)
  params = init(module, x)
  valid = jnp.array([[True] * 3, [False] * 3])
  grads = jax.jit(jax.grad(lambda p: module.apply(p, x, valid=valid).sum()))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_encoder_layer_is_pytorchs(valid):
  torch = pytest.importorskip("torch")
  x = np.random.default_rng(2).normal(size=(B, L, 6)).astype(np.float32)
  reference = torch.nn.TransformerEncoderLayer(6, 3, dim_feedforward=10, batch_first=True).eval()
  for parameter in reference.parameters():
    torch.nn.init.normal_(parameter, std=0.5)
  theirs = reference(torch.tensor(x), src_key_padding_mask=torch.tensor(~valid))
  module = layers.TransformerEncoderLayer(3, feedforward=10)
  params = imported(module, reference, torch_import.encoder_layer_rules("m", "m"), x)
  ours = jax.jit(module.apply)(params, x, valid)
  kept = valid[..., None]  # what stands on padding differs, and nobody reads it
  np.testing.assert_allclose(np.asarray(ours) * kept, theirs.detach().numpy() * kept, atol=2e-5)


def test_initialisers_have_pytorchs_ranges():
  """U(±1/√in) for Dense, U(±1/√H) for the LSTM, Xavier's range for the fused projection."""
  x = jnp.zeros((1, 2, 64))

  def spread(array):
    return float(jnp.abs(array).max()), float(jnp.std(array))

  dense = init(layers.Dense(100), x)["params"]
  lstm = init(layers.LSTM(25), x)["params"]
  attention = init(layers.MultiHeadAttention(4), x)["params"]
  cases = [(dense["kernel"], 1 / 8), (dense["bias"], 1 / 8), (lstm["w_ih"], 1 / 5)]
  cases += [(lstm["w_hh"], 1 / 5), (lstm["b_ih"], 1 / 5), (lstm["b_hh"], 1 / 5)]
  cases += [(attention["in_kernel"], math.sqrt(6 / 256)), (attention["out_kernel"], 1 / 8)]
  for array, bound in cases:
    largest, std = spread(array)
    assert largest <= bound
    np.testing.assert_allclose([largest, std], [bound, bound / math.sqrt(3)], rtol=0.2)


@pytest.mark.parametrize("shape", [(3,), (4, 40), (17, 40, 3), (300, 301)])
def test_drawn_parameters_are_those_of_an_array_of_their_shape(shape):
  key = jax.random.key(7)
  uniform = jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5)
  np.testing.assert_array_equal(layers.uniform(0.5)(key, shape), uniform)
  np.testing.assert_allclose(
    layers.normal(0.5)(key, shape), 0.5 * jax.random.normal(key, shape), rtol=1e-6
  )


def test_shapes_share_the_programs_that_draw_parameters():
  sizes = []
  for count in range(1, 20000, 499):
    assert layers.drawn(lambda _, n: sizes.append(n) or jnp.zeros(n), None, (count,)).size == count
  assert sorted(set(sizes)) == [(4**n,) for n in range(4, 9)]
  for count, size in ((70_000, 4**9), (600_000, 4**10), (1_100_000, 2**21), (2_100_000, 2**22)):
    layers.drawn(lambda _, n: sizes.append(n) or jnp.zeros(n), None, (count,))
    assert sizes[-1] == (size,)


def test_reverse_gradient_is_the_identity_with_a_reversed_gradient():
  x = jnp.array([1.0, -2.0])
  np.testing.assert_array_equal(layers.reverse_gradient(x, 0.3), x)
  grads = jax.grad(lambda x: (layers.reverse_gradient(x, 0.3) ** 2).sum())(x)
  np.testing.assert_allclose(grads, -0.6 * x, rtol=1e-6)
  twice = jax.jit(jax.grad(lambda x: layers.reverse_gradient(layers.reverse_gradient(x)).sum()))
  np.testing.assert_allclose(twice(x), jnp.ones(2), rtol=1e-6)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_reverse_gradient_differentiates_twice(order):
  """The derivative of the reversed gradient field -s f'(x), not of the function -s f(x)."""
  with jax.enable_x64(True):
    x, v, scale = jnp.array([0.3, -1.2]), jnp.array([0.7, 0.4]), 0.5
    field = jax.grad(lambda x: jnp.sin(layers.reverse_gradient(x * 2.0, scale)).sum())
    # the Jacobian is diagonal, hence its own transpose
    ours = jax.jvp(field, (x,), (v,))[1] if order == "forward" else jax.vjp(field, x)[1](v)[0]
    np.testing.assert_allclose(field(x), -scale * 2 * jnp.cos(2 * x), rtol=1e-12)
    np.testing.assert_allclose(ours, scale * 4 * jnp.sin(2 * x) * v, rtol=1e-12)


def test_meta_gradient_through_reverse_gradient():
  """Second-order M³S: d outer(θ - α g(θ)) / dθ, where g holds the reversed field."""
  with jax.enable_x64(True):
    rows = np.random.default_rng(3).normal(size=(4, 2))

    def loss(params, batch, key, extra):
      hidden = jnp.tanh(batch @ params["encoder"])
      value = (hidden @ params["head"] - 1).mean() ** 2
      value += (jnp.tanh(layers.reverse_gradient(hidden, 0.8)) @ params["critic"]).mean() ** 2
      return value, types.Aux({}, extra)

    params = {
      "encoder": jnp.array([[0.3, -0.5], [0.9, 0.2]]),
      "head": jnp.array([0.7, -0.4]),
      "critic": jnp.array([0.5, 1.1]),
    }
    reversed_field = jax.grad(lambda p: loss(p, rows, None, {})[0])

    def outer(params):  # what the meta-gradient is the gradient of, as plain functions of θ
      for _ in range(2):
        params = jax.tree.map(lambda p, g: p - 0.4 * g, params, reversed_field(params))
      return jnp.sin(params["encoder"]).sum() + (params["head"] ** 2).sum()

    ours, outer = jax.jit(jax.grad(outer))(params), jax.jit(outer)
    for name in params:
      for position in np.ndindex(params[name].shape):
        eps = 1e-6
        moved = [
          outer({**params, name: params[name].at[position].add(sign * eps)}) for sign in (1, -1)
        ]
        difference = (moved[0] - moved[1]) / (2 * eps)
        np.testing.assert_allclose(ours[name][position], difference, rtol=1e-6, atol=1e-9)


def test_mean_over_steps(x, valid):
  ours = layers.mean_over_steps(x, valid)
  np.testing.assert_allclose(ours[0], x[0, : LENGTHS[0]].mean(0), rtol=1e-5)
  empty = layers.mean_over_steps(x, np.zeros_like(valid))
  np.testing.assert_array_equal(empty, np.zeros((B, D)))


def test_dropout_only_with_a_key():
  x = jnp.ones((4, 50))
  module = layers.Dropout(0.5)
  np.testing.assert_array_equal(module.apply({}, x), x)
  dropped = module.apply({}, x, rngs={"dropout": jax.random.key(0)})
  assert set(np.unique(dropped)) == {0.0, 2.0}


def test_joint_logits_are_those_of_independent_answers():
  """Cross-entropy and divergence are the sums of the binary ones."""
  scores = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
  joint = np.asarray(layers.joint(jnp.asarray(scores)))
  assert joint.shape == (2, 5, 8)
  each = jax.nn.log_softmax(scores.reshape(2, 5, 3, 2))
  whole = jax.nn.log_softmax(joint)
  for answer in range(8):
    picked = sum(each[:, :, k, answer >> k & 1] for k in range(3))
    np.testing.assert_allclose(whole[..., answer], picked, atol=1e-5)
  np.testing.assert_array_equal(joint.argmax(-1), np.asarray(each).argmax(-1) @ [1, 2, 4])
  divergence = (np.exp(whole[0]) * (whole[0] - whole[1])).sum(-1)
  parts = (np.exp(each[0]) * (each[0] - each[1])).sum((-1, -2))
  np.testing.assert_allclose(divergence, parts, atol=1e-5)


class Tower(nn.Module):
  dropout: float

  @nn.compact
  def __call__(self, x):
    return layers.Dropout(self.dropout)(layers.Dense(3, name="dense")(x))


class Towers(nn.Module):
  """Two of one width, of which one drops all but everything, and a wider one."""

  alone: bool

  @nn.compact
  def __call__(self, inputs):
    towers = [Tower(rate, name=f"tower_{n}") for n, rate in enumerate((0.0, 0.9, 0.9))]
    args = [(x,) for x in inputs]
    if self.alone:
      return [tower(*given) for tower, given in zip(towers, args, strict=True)]
    return batched.together(towers, args)


def test_towers_together_compute_what_each_does_alone():
  random = np.random.default_rng(0)
  inputs = [random.normal(size=(50, width)).astype(np.float32) for width in (4, 4, 5)]
  params, same = (Towers(alone).init(jax.random.key(0), inputs) for alone in (False, True))
  jax.tree.map(np.testing.assert_array_equal, params, same)

  def gradient(alone, key=None):
    rngs = {} if key is None else {"dropout": key}

    def loss(params):
      found = Towers(alone).apply(params, inputs, rngs=rngs)
      return sum(jnp.sum(y**2) for y in found), found

    return jax.grad(loss, has_aux=True)

  together, alone = gradient(False)(params), gradient(True)(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together, alone)
  seeds = jax.vmap(gradient(False))(jax.tree.map(lambda a: jnp.stack([2 * a, a]), params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, 1e-4, 1e-4), seeds, alone)
  one, two = (
    len(jaxprs.named(jax.make_jaxpr(gradient(alone))(params).jaxpr, "dot_general"))
    for alone in (False, True)
  )
  assert one * 3 == two * 2
  _, (kept, dropped, _) = gradient(False, jax.random.key(1))(params)
  np.testing.assert_allclose(kept, alone[1][0], rtol=1e-5)
  gone = np.asarray(dropped) == 0
  assert 0.8 < gone.mean() < 0.98
  np.testing.assert_allclose(dropped[~gone], 10 * alone[1][1][~gone], rtol=1e-5)


def test_what_towers_share_is_copied_forwards_and_not_where_gradients_are_handed_out():
  """In every order: tangents are joined as what they belong to."""
  inputs = [np.ones((2, width), np.float32) for width in (4, 4, 5)]
  params = Towers(False).init(jax.random.key(0), inputs)

  def loss(params):
    return sum(jnp.sum(y**2) for y in Towers(False).apply(params, inputs))

  def copies(function):
    return len(jaxprs.named(jax.make_jaxpr(function)(params).jaxpr, "rows"))

  assert copies(loss) == 3  # kernels, vectors, inputs
  assert copies(jax.grad(loss)) == 3
  assert copies(lambda params: jax.jvp(jax.grad(loss), (params,), (params,))) == 3 + 2


def test_a_gpus_kernels_do_not_hold_which_row_they_read():
  """Else no two layers' kernels were one."""
  inputs = [np.ones((2, width), np.float32) for width in (4, 4, 5)]
  params = Towers(False).init(jax.random.key(0), inputs)

  def cuts(platform):
    function = jax.jit(lambda params: Towers(False).apply(params, inputs)[:2])
    text = function.trace(params).lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.dynamic_slice"), text.count("stablehlo.slice")

  (static, looked_up), (dynamic, left) = cuts("cpu"), cuts("cuda")
  assert static == 0 and dynamic == 3 == looked_up - left
  x = jax.random.normal(jax.random.key(0), (3, 2, 4))
  for row, same in zip(jax.jit(batched._looked_up)(x), x, strict=True):
    np.testing.assert_array_equal(row, same)


class Norms(nn.Module):
  """Three norms of one array."""

  alone: bool

  @nn.compact
  def __call__(self, x):
    norms = [layers.LayerNorm(name=f"norm_{n}") for n in range(3)]
    return [norm(x) for norm in norms] if self.alone else batched.together(norms, [(x,)] * 3)


def test_towers_of_one_array_read_it_once_and_copy_their_vectors_at_once(x):
  random = np.random.default_rng(1)
  params = Norms(True).init(jax.random.key(0), x)
  params = jax.tree.map(lambda a: random.normal(size=a.shape).astype(np.float32), params)

  def loss(params, x, alone):
    found = Norms(alone).apply(params, x)
    return sum(n * jnp.sum(y**2) for n, y in enumerate(found, 1)), found

  gradient = jax.grad(loss, (0, 1), has_aux=True)
  together, alone = (gradient(params, x, alone) for alone in (False, True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), together, alone)
  traced = jax.make_jaxpr(lambda params, x: loss(params, x, False))(params, x).jaxpr
  (norm,) = jaxprs.named(traced, "rsqrt")
  assert norm.outvars[0].aval.size == x[..., 0].size
  copies = [jaxprs.named(traced, name) for name in ("stack", "concatenate")]
  assert len([*copies[0], *copies[1]]) == 1


def test_attention_projects_what_reads_one_array_by_one_product(x):
  module, other = layers.MultiHeadAttention(1), 2 * x[:, :2]
  params = init(module, x)

  def products(*args):
    traced = jax.make_jaxpr(lambda: module.apply(params, *args))().jaxpr
    return len(jaxprs.named(traced, "dot_general"))

  itself, source, three = products(x), products(x, other), products(x, other, 3 * other)
  assert (source - itself, three - source) == (1, 1)
  y = module.apply(params, x, other)
  np.testing.assert_allclose(y, module.apply(params, x, other, other + 0), rtol=1e-5)
  np.testing.assert_allclose(module.apply(params, x), module.apply(params, x, x + 0), rtol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_a_norms_derivatives_are_those_of_its_formula_to_the_third(epsilon):
  x, *along = jax.random.normal(jax.random.key(0), (4, 2, 3, 7))

  def formula(x):
    centered = x - x.mean(-1, keepdims=True)
    factor = (jnp.square(centered).mean(-1, keepdims=True) + epsilon) ** -0.5
    return centered * factor, factor

  def derivatives(norm):
    """Of a function of both results: reverse, reverse over reverse, and forward over both."""
    value = lambda x: sum(jnp.sum(jnp.sin(2 * a + 0.3)) for a in norm(x))  # noqa: E731
    first = jax.grad(value)
    second = jax.grad(lambda x: jnp.vdot(first(x), along[0]))
    third = jax.jvp(jax.grad(lambda x: jnp.vdot(second(x), along[1])), (x,), (along[2],))
    return value(x), first(x), second(x), *third

  found = jax.jit(lambda: derivatives(lambda x: layers.normalized(x, epsilon)))()
  wanted = jax.jit(lambda: derivatives(formula))()
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
