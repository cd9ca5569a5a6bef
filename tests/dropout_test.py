"""Bits that look random from every side that a network's masks could be seen from."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprs
import models_test
from mmjax import dropout, layers, models

KEY = dropout.cheap(jax.random.key(0))


def coins(words):
  """Of [..., N] words of 32 bits, the bits [..., N, 32] as ±1."""
  words = np.asarray(words)[..., None]
  return 2.0 * (words >> np.arange(32, dtype=np.uint32) & 1) - 1


def assert_fair(signs):
  """Means of ±1 by the last axis are within five deviations of those of fair coins."""
  assert np.abs(signs.mean(0)).max() < 5 / np.sqrt(len(signs))


def seeded(impl):
  """Keys of the seeds 0, 1, 2 …, as users choose them."""
  return jax.vmap(lambda seed: dropout.cheap(jax.random.key(seed, impl=impl)))(jnp.arange(2**14))


def families():
  """Words [2^14, 2] that should know nothing of each other: neighbours in a row of one key."""
  words = jax.random.bits(KEY, (2**14, 64), jnp.uint32)
  numbers = jnp.arange(2**14)
  folded = jax.vmap(lambda n: jax.random.fold_in(KEY, n))(numbers)
  split = jax.random.split(KEY, 2**14)
  first = lambda keys: jax.vmap(lambda k: jax.random.bits(k, (2,), jnp.uint32))(keys)  # noqa: E731
  yield "words", words[:, :2]
  yield "rows", jnp.stack([words[:-1, 0], words[1:, 0]], -1)
  yield "of a fold", first(folded)
  yield "of folds in a row", jnp.stack([first(folded)[:-1, 0], first(folded)[1:, 0]], -1)
  yield "of splits", first(split)
  yield "of splits in a row", jnp.stack([first(split)[:-1, 0], first(split)[1:, 0]], -1)
  for impl in ("threefry2x32", "rbg"):
    seeds = first(seeded(impl))
    yield f"of seeds, {impl}", jnp.stack([seeds[:-1, 0], seeds[1:, 0]], -1)
  yield "a key and its words", jnp.stack([jax.random.key_data(folded)[:, 0], words[:, 0]], -1)
  yield "folds and splits", jnp.stack([first(folded)[:, 0], first(split)[:, 0]], -1)
  twice = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(KEY, n), 1))(numbers)
  yield "a fold and its own", jnp.stack([first(folded)[:, 0], first(twice)[:, 0]], -1)


@pytest.mark.parametrize("words", [pytest.param(w, id=name) for name, w in families()])
def test_bits_are_fair_and_of_two_words_no_bit_tells_another(words):
  one, other = coins(words[:, 0]), coins(words[:, 1])
  assert_fair(one)
  assert_fair(other)
  assert_fair((one[:, :, None] * other[:, None, :]).reshape(len(one), -1))
  pairs = one[:, :, None] * one[:, None, :]
  assert_fair(pairs[:, ~np.eye(32, dtype=bool)])


def test_uniforms_fill_the_square():
  """Pairs of numbers, of words in a row and of rows, by a chi-squared of 64 x 64 cells."""
  drawn = np.asarray(jax.random.uniform(KEY, (512, 512)))
  for one, other in ((drawn[:, ::2], drawn[:, 1::2]), (drawn[::2], drawn[1::2])):
    count = np.histogram2d(one.ravel(), other.ravel(), 64, ((0, 1), (0, 1)))[0]
    expected = count.sum() / 64**2
    chi2, cells = ((count - expected) ** 2 / expected).sum(), 64**2 - 1
    assert abs(chi2 - cells) < 5 * np.sqrt(2 * cells)


def test_numbers_hang_on_key_and_place_alone():
  whole = jax.random.bits(KEY, (6, 4))
  np.testing.assert_array_equal(jax.jit(lambda k: jax.random.bits(k, (6, 4)))(KEY), whole)
  np.testing.assert_array_equal(jax.random.bits(KEY, (24,)), whole.reshape(-1))
  keys = jax.random.split(KEY, 3)
  several = jax.vmap(lambda k: jax.random.bits(k, (6, 4)))(keys)
  for key, found in zip(keys, several, strict=True):
    np.testing.assert_array_equal(jax.random.bits(key, (6, 4)), found)
  assert len(np.unique(np.concatenate([whole.ravel(), several.ravel()]))) == 24 * 4
  seeds = [jax.random.key_data(jax.random.key(n, impl=dropout.IMPL)) for n in range(3)]
  assert len({tuple(map(int, seed)) for seed in seeds}) == 3
  for width in (8, 16):
    bits = jax.random.bits(KEY, (2**12,), f"uint{width}")
    assert_fair(2.0 * (np.asarray(bits)[:, None] >> np.arange(width, dtype=bits.dtype) & 1) - 1)
  with jax.enable_x64(True):
    assert len(np.unique(jax.random.bits(KEY, (100,), jnp.uint64) >> 32)) == 100


@pytest.mark.parametrize(
  "key", [jax.random.key(1), jax.random.PRNGKey(1), jax.random.key(1, impl="rbg")]
)
def test_a_key_of_any_kind_drops_the_share(key):
  x = jnp.ones((50, 40, 30))
  module = nn.Sequential([layers.Dropout(0.3), lambda x: x])
  out = np.asarray(module.apply({}, x, rngs={"dropout": dropout.cheap(key)}))
  np.testing.assert_allclose(np.unique(out), [0, 1 / 0.7], rtol=1e-6)
  for axes in ((), (0,), (1,), (2,)):
    rest = out.mean(axes) * 0.7 if axes else out * 0.7
    share, count = rest.mean(), 60_000
    assert abs(share - 0.7) < 5 * np.sqrt(0.21 / count)
    if axes:
      deviation = np.sqrt(0.21 / x.shape[axes[0]])
      assert abs(rest.std() / deviation - 1) < 0.1


def test_no_mask_of_a_network_is_drawn_with_the_users_key():
  system = models.MODELS["cenet"](**models_test.SETTINGS["cenet"])
  spec = models_test.make_spec(True, 0)
  params, extra = jax.eval_shape(lambda key: system.init(key, spec), jax.random.key(0))
  args = params, models_test.make_batch(spec), jax.random.key(1), extra
  traced = jax.make_jaxpr(system.phases[0].loss)(*args).jaxpr
  drawn = collections.Counter(
    str(equation.invars[0].aval.dtype)
    for name in ("random_bits", "random_fold_in", "random_split")
    for equation in jaxprs.named(traced, name)
  )
  assert drawn.keys() == {"key<drop>"} and drawn["key<drop>"] > 10
