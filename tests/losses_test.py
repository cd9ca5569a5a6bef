"""Losses: closed forms, gradients against finite differences, values of published code."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from mmjax import losses, types

DATA = pathlib.Path(__file__).parent / "data"


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape) for shape in shapes]


def check_in_float64(function, *args):
  """Reverse-mode gradients against central differences."""
  with jax.enable_x64(True):
    args = [jnp.asarray(a, jnp.float64) for a in args]
    check_grads(function, args, order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


# --- values


def test_task_loss_by_hand():
  p, y = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])
  np.testing.assert_allclose(losses.task(p, y), [0.25, 9.0])
  np.testing.assert_allclose(losses.task(p, y, "l1"), [0.5, 3.0])
  logits = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]))
  for label in (jnp.array([2, 0]), jnp.array([2.0, 0.0])):
    np.testing.assert_allclose(losses.task(logits, label), -np.log([0.5, 0.1]), rtol=1e-5)


def test_wrong_arguments_are_refused():
  with pytest.raises(ValueError, match="l2"):
    losses.task(jnp.zeros(2), jnp.zeros(2), "l2")
  with pytest.raises(AssertionError):
    losses.task(jnp.zeros((2, 3)), jnp.zeros(3, int))
  with pytest.raises(AssertionError):  # [B, 1] against [B] must not become [B, B]
    losses.absolute_error(jnp.zeros((2, 1)), jnp.zeros(2))
  with pytest.raises(AssertionError):
    losses.cmd(jnp.zeros((3, 2)), jnp.zeros((3, 4)))


def test_masked_mean_ignores_what_is_masked_out():
  values = jnp.array([1.0, 2.0, jnp.nan])
  assert losses.masked_mean(values, jnp.array([1.0, 1.0, 0.0])) == 1.5
  np.testing.assert_allclose(
    jax.grad(lambda v: losses.masked_mean(v, jnp.array([3.0, 1.0, 0.0])))(values), [0.75, 0.25, 0]
  )
  assert losses.masked_mean(values, jnp.zeros(3)) == 0
  assert losses.masked_mean(jnp.ones((2, 3, 4)), jnp.array([True, False])[:, None, None]) == 1


def test_reconstruction_counts_the_masked_entries_only():
  target = jnp.arange(12.0).reshape(2, 3, 2)
  prediction = target + jnp.array([1.0, 2.0, 3.0])[None, :, None]
  assert losses.reconstruction(prediction, target) == pytest.approx((1 + 4 + 9) / 3)
  missing = jnp.array([[True, False, True]])[..., None]
  assert losses.reconstruction(prediction, target, missing) == 5
  smooth = losses.reconstruction(prediction, target, missing, error=optax.losses.huber_loss)
  assert smooth == pytest.approx((0.5 + 2.5) / 2)
  assert losses.reconstruction(prediction, target, jnp.zeros_like(missing)) == 0


@pytest.mark.parametrize("error", [optax.losses.squared_error, optax.losses.huber_loss])
def test_reconstruction_does_not_read_what_is_masked_out(error):
  prediction = jnp.arange(12.0).reshape(2, 3, 2)
  mask = jnp.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])[..., None]
  target = jnp.ones((2, 3, 2)).at[0, 2].set(jnp.nan)
  loss = jax.value_and_grad(lambda p, t: losses.reconstruction(p, t, mask, error=error), (0, 1))
  found, expected = loss(prediction, target), loss(prediction, jnp.nan_to_num(target, nan=5.0))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert (found[1][0][0, 2] == 0).all() and (found[1][0][1] != 0).all()


def test_cmd_by_hand():
  x, y = jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [7.0]])
  # means 1 and 5; central moments 1, 0, 1 and 4, 0, 16
  assert losses.cmd(x, y, moments=1) == pytest.approx(4)
  assert losses.cmd(x, y, moments=2) == pytest.approx(4 + 3)
  assert losses.cmd(x, y, moments=4) == pytest.approx(4 + 3 + 0 + 15)


def test_cmd_at_rest_has_a_finite_gradient():
  (x,) = draw((5, 3))
  value, grads = jax.value_and_grad(losses.cmd, (0, 1))(jnp.asarray(x), jnp.asarray(x))
  assert value == 0
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def test_difference_of_a_constant_has_a_finite_gradient():
  (y,) = draw((5, 3))
  np.testing.assert_array_equal(jax.grad(losses.difference)(jnp.ones((5, 2)), y), 0)


def test_difference_is_zero_for_orthogonal_and_one_for_equal_directions():
  x = jnp.array([[1.0], [-1.0]])
  assert losses.difference(x, 5 * x) == pytest.approx(4, rel=1e-4)  # (1 + 1)²
  wide = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
  other = jnp.array([[1.0], [1.0], [-1.0], [-1.0]])
  assert losses.difference(wide, other) == pytest.approx(0, abs=1e-12)
  assert losses.difference(jnp.ones((3, 2, 2)), jnp.ones((3, 1))) == 0  # flattened; no NaN


def test_info_nce_by_hand():
  x = jnp.eye(2) * 7  # the scale does not matter
  pair, cross = np.exp(1 / 0.5), np.exp(0)
  np.testing.assert_allclose(
    losses.info_nce(x, jnp.eye(2), temperature=0.5),
    -np.log(pair / (pair + cross)) * np.ones(2),
    rtol=1e-5,
  )
  y = jnp.array([[1.0, 0.0], [1.0, 0.0]])  # row 1 of x meets two wrong partners
  np.testing.assert_allclose(losses.info_nce(x, y), np.log([2.0, 2.0]), rtol=1e-5)
  blank = x.at[1].set(0)  # a sample whose text is missing altogether
  np.testing.assert_allclose(losses.info_nce(blank, y)[1], np.log(2.0), rtol=1e-5)
  other = jnp.array([[1.0, 0.0], [1.0, 1.0]])  # no row of which it is nearer to
  np.testing.assert_allclose(losses.info_nce(blank, other)[1], np.log(2.0), rtol=1e-5)
  gradient = jax.grad(lambda a: losses.info_nce(a, y).sum())(blank)
  np.testing.assert_array_equal(gradient[1], 0)


# --- gradients


def test_gradients_against_finite_differences():
  x, y, z = draw((6, 4), (6, 4), (9, 4))
  check_in_float64(losses.cmd, x, z)
  check_in_float64(lambda a, b: losses.info_nce(a, b, 0.3).sum(), x, y)
  check_in_float64(lambda a, b: losses.reconstruction(a, b, y > 0), x, z[:6])


def test_gradient_of_difference_holds_the_norms_constant():
  x, y = draw((6, 4), (6, 3))
  with jax.enable_x64(True):
    scale_x, scale_y = (
      1 / (np.linalg.norm(z - z.mean(0), axis=1, keepdims=True) + 1e-6) for z in (x, y)
    )

    def with_constant_norms(a, b):
      a, b = a - a.mean(0)[None], b - b.mean(0)[None]
      return jnp.mean(((a * scale_x).T @ (b * scale_y)) ** 2)

    check_grads(with_constant_norms, (x, y), order=1, modes=["rev"], eps=1e-5)
    for i in (0, 1):
      np.testing.assert_allclose(
        jax.grad(losses.difference, i)(x, y), jax.grad(with_constant_norms, i)(x, y), rtol=1e-9
      )


# --- parity with published code


@pytest.fixture(scope="module")
def misa():
  return dict(np.load(DATA / "misa.npz"))


def test_cmd_equals_the_published_misa(misa):
  shared = [misa[f"output/utt_shared_{m}"] for m in "tav"]
  pairs = [losses.cmd(x, y) for x, y in itertools.combinations(shared, 2)]
  np.testing.assert_allclose(np.mean(pairs), misa["loss/cmd"], rtol=1e-5)


def test_difference_equals_the_published_misa(misa):
  private = [misa[f"output/utt_private_{m}"] for m in "tav"]
  shared = [misa[f"output/utt_shared_{m}"] for m in "tav"]
  pairs = [*zip(private, shared, strict=True), *itertools.combinations(private, 2)]
  total = sum(losses.difference(x, y) for x, y in pairs)
  np.testing.assert_allclose(total, misa["loss/diff"], rtol=1e-5)


def test_reconstruction_and_mse_equal_the_published_misa(misa):
  parts = [
    losses.reconstruction(misa[f"output/utt_{m}_recon"], misa[f"output/utt_{m}_orig"])
    for m in "tva"
  ]
  np.testing.assert_allclose(np.mean(parts), misa["loss/recon"], rtol=1e-5)
  error = losses.task(misa["output/M"].reshape(-1), misa["input/labels"].reshape(-1))
  np.testing.assert_allclose(error.mean(), misa["loss/cls"], rtol=1e-5)


def test_info_nce_equals_the_published_mmim():
  mmim = np.load(DATA / "mmim.npz")
  for m in "tav":
    weight, bias = (mmim[f"param/cpc_z{m}.net.{part}"] for part in ("weight", "bias"))
    predicted = mmim["output/Feature_f"] @ weight.T + bias
    ours = losses.info_nce(jnp.asarray(mmim[f"output/Feature_{m}"]), jnp.asarray(predicted))
    np.testing.assert_allclose(ours.mean(), mmim[f"mid/nce_{m}"], rtol=1e-5)


def test_gradients_equal_pytorch_on_the_published_formulas():
  torch = pytest.importorskip("torch")
  x, y = (a.astype(np.float32) for a in draw((6, 4), (6, 4)))
  a, b = (torch.tensor(v, requires_grad=True) for v in (x, y))

  def torch_cmd():
    total = ((a.mean(0) - b.mean(0)) ** 2).sum().sqrt()
    for k in range(2, 6):
      moments = [((v - v.mean(0)) ** k).mean(0) for v in (a, b)]
      total = total + ((moments[0] - moments[1]) ** 2).sum().sqrt()
    return total

  def torch_difference():
    unit = [
      (v - v.mean(0)) / ((v - v.mean(0)).norm(dim=1, keepdim=True).detach() + 1e-6) for v in (a, b)
    ]
    return ((unit[0].T @ unit[1]) ** 2).mean()

  for ours, theirs in ((losses.cmd, torch_cmd), (losses.difference, torch_difference)):
    value = theirs()
    grads = torch.autograd.grad(value, (a, b))
    np.testing.assert_allclose(ours(x, y), value.item(), rtol=1e-5)
    for mine, grad in zip(jax.grad(ours, (0, 1))(x, y), grads, strict=True):
      np.testing.assert_allclose(mine, grad.numpy(), rtol=1e-4, atol=1e-6)


# --- combinators


def make_loss(power):
  def loss(params, batch, key, extra):
    noise = 0.0 if key is None else jax.random.normal(key)
    value = jnp.sum(params["head"]["w"] ** power) + batch * noise
    return value, types.Aux({"power": jnp.float32(power)}, {"calls": extra["calls"] + power})

  return loss


def test_weighted_sum_adds_names_and_threads_extra():
  terms = {"square": (2.0, make_loss(2)), "cube": (-0.5, make_loss(3))}
  loss = losses.weighted_sum(terms)
  params = {"head": {"w": jnp.array([1.0, 2.0])}}
  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, 1.0, None, {"calls": 0})
  assert value == 2 * 5 - 0.5 * 9 and aux.extra == {"calls": 5}
  assert aux.metrics == {"square": 5, "square/power": 2, "cube": 9, "cube/power": 3}
  np.testing.assert_allclose(grads["head"]["w"], [4 - 1.5, 8 - 6])

  _, noisy = loss(params, 1.0, jax.random.key(0), {"calls": 0})
  noise = noisy.metrics["square"] - 5, noisy.metrics["cube"] - 9
  assert noise[0] != noise[1] and 0 not in noise  # keys of their own


def test_with_l2_takes_the_matching_parameters():
  params = {"head": {"w": jnp.array([1.0, 2.0])}, "body": {"w": jnp.array([3.0])}}
  for pattern, squares in (("", 14), ("head/w", 5), ("^body", 9)):
    loss = losses.with_l2(make_loss(2), 0.1, pattern)
    value, aux = loss(params, 0.0, None, {"calls": 0})
    assert value == pytest.approx(5 + 0.1 * squares) and aux.metrics["l2"] == squares
  with pytest.raises(ValueError, match="tail"):
    losses.with_l2(make_loss(2), 0.1, "tail")(params, 0.0, None, {"calls": 0})
