"""Keys for dropout, whose masks are as large as the activations: a generator that costs little.

JAX's own, threefry, takes some 120 operations for each entry, and a fused program computes them
anew wherever a mask is read. Here a word is a hash of its number and the key, 18 operations. Its
numbers hang on neither device nor sharding. What a loss or a mask of missing data draws stays with
the kind of key that a user gave.
"""

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

from mmjax import types

Array = jax.Array

SPLIT, FOLD = 0x9E3779B9, 0x7F4A7C15  # set new keys apart from each other and from words


def cheap(key: types.PRNGKey) -> types.PRNGKey:
  """A key for dropout masks of the words of a key of any kind; nothing is drawn with that."""
  data = jax.random.key_data(key)
  words = data[:2]
  for n in range(2, len(data), 2):
    words = _mixed(words) ^ data[n : n + 2]
  return jax.random.wrap_key_data(words, impl=IMPL)


def _mixed(word: Array) -> Array:
  """The finalizer of MurmurHash3: one bit more or less turns half of the bits of the result."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    word = (word ^ (word >> jnp.uint32(shift))) * jnp.uint32(factor)
  return word ^ (word >> jnp.uint32(16))


def _words(key: Array, number: Array, of: int = 0) -> Array:
  """A word for each number under a key; `of` sets other words of the same numbers apart."""
  return _mixed(_mixed(number + key[0]) ^ (key[1] ^ jnp.uint32(of)))


def _keys(key: Array, number: Array, of: int) -> Array:
  """A key for each number."""
  return jnp.stack([_words(key, number, of), _words(key[::-1], number, of)], -1)


def _numbers(shape: tuple[int, ...]) -> Array:
  """Of each entry its number."""
  number = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  return number


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
  word = _words(key, _numbers(shape))
  if bit_width == 64:
    second = _words(key[::-1], _numbers(shape))
    return word.astype(jnp.uint64) << jnp.uint64(32) | second.astype(jnp.uint64)
  return word.astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bit_width])


def _split(key: Array, shape: tuple[int, ...]) -> Array:
  return _keys(key, _numbers(shape), SPLIT)


def _fold_in(key: Array, data: Array | int) -> Array:
  return _keys(key, jnp.asarray(data).astype(jnp.uint32), FOLD)


def _seed(seed: Array) -> Array:
  seed = jnp.asarray(seed)
  high = (seed >> 32).astype(jnp.uint32) if seed.dtype.itemsize > 4 else jnp.uint32(0)
  return jnp.stack([high, seed.astype(jnp.uint32)])


IMPL = define_prng_impl(
  key_shape=(2,),
  seed=_seed,
  split=_split,
  random_bits=_random_bits,
  fold_in=_fold_in,
  name="mmjax_dropout",
  tag="drop",
)
