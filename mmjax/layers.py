"""Layers with PyTorch's semantics and initialisers, so that published weights fit.

Sequences are [B, L, D] with `valid` [B, L], True on the real steps, which come first.
Every module is a linen module; dropout is on where a "dropout" key is given to `apply`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import recurrence, types

Array = types.Array


def drawn(sample: Callable, key: types.PRNGKey, shape: Sequence[int]) -> Array:
  """The first of the numbers `sample(key, [n])`, for an n that many shapes share.

  A program of every shape would take longer to compile than all else of a start. As Threefry
  tells a number by its place alone, they are the numbers of an array of that shape.
  """
  count = math.prod(shape)
  size = 1 << max(8, (count - 1).bit_length())
  if size < 1 << 20 and size.bit_length() % 2 == 0:
    size *= 2  # powers of 4, where twice as many cost next to nothing
  return _first(sample(key, (size,)), tuple(shape))


@functools.partial(jax.jit, static_argnums=1)
def _first(numbers, shape):
  return numbers[: math.prod(shape)].reshape(shape)


def normal(std: float) -> Callable:
  """N(0, std²)."""

  def init(key, shape, dtype=jnp.float32):
    scale = np.sqrt(2).astype(dtype) * np.asarray(std, dtype)
    return drawn(lambda key, shape: _normal(key, scale, shape, dtype), key, shape)

  return init


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(key, scale, shape, dtype):
  """`jax.random.normal`, scaled; one program for all deviations."""
  uniform = jax.random.uniform(key, shape, dtype, np.nextafter(np.asarray(-1, dtype), 0), 1)
  return jax.lax.erf_inv(uniform) * scale


def uniform(bound: float) -> Callable:
  """U(-bound, bound)."""

  def init(key, shape, dtype=jnp.float32):
    return drawn(lambda k, n: jax.random.uniform(k, n, dtype, -bound, bound), key, shape)

  return init


def xavier_uniform(key: types.PRNGKey, shape: Sequence[int], dtype=jnp.float32) -> Array:
  """U(±√(6 / (in + out))) of [..., in, out]."""
  return uniform(math.sqrt(6 / (shape[-2] + shape[-1])))(key, shape, dtype)


def _last(vector: Array, rank: int) -> Array:
  """[D] as the last of `rank` axes, spelled out: `jax_numpy_rank_promotion=raise` may be set."""
  return jax.lax.broadcast_to_rank(vector, rank)


class Dense(nn.Module):
  """nn.Linear: kernel [in, out] and bias from U(±1/√in). `use_bias` as in linen.

  A head's `features` may be (K, 2), the answers to K binary problems: its kernel is then
  [in, 2K], its bias [K, 2], and what it returns are their `joint` logits.
  """

  features: int | tuple[int, int]
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    bound, shape = 1 / math.sqrt(x.shape[-1]), outputs(self.features)
    size = math.prod(shape)
    kernel = self.param("kernel", uniform(bound), (x.shape[-1], size))
    # in rows: the kernel's gradient then needs no transposed copy of x (XLA on a CPU)
    y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], size)
    if self.use_bias:
      y = y + _last(self.param("bias", uniform(bound), shape).reshape(-1), y.ndim)
    return joint(y) if len(shape) == 2 else y


def outputs(features: int | tuple[int, int]) -> tuple[int, ...]:
  """The shape of a head's outputs: (C,), or (K, 2) of K >= 2 binary problems."""
  return (features,) if isinstance(features, int) else tuple(features)


def joint(scores: Array) -> Array:
  """Logits of all answers to K binary problems at once, from the logits of each answer.

  The problems are independent, so an answer's logit is the sum of its parts'. The softmax
  cross-entropy of these logits is the sum of the K binary ones, the divergence of two such
  distributions the sum of K divergences, and the largest logit is the answer whose every part is
  the likelier one: whatever treats classes treats binary problems right.

  Args:
    scores: [..., 2K] logits of no and yes to each problem in turn.

  Returns:
    [..., 2^K], of the answers by number: bit k is the answer to problem k.
  """
  pairs = scores.reshape(*scores.shape[:-1], -1, 2)
  count = pairs.shape[-2]
  answers = np.arange(2**count)[None] >> np.arange(count)[:, None] & 1  # [K, 2^K]
  chosen = np.stack([1 - answers, answers], 1)  # [K, 2, 2^K]
  return jnp.einsum("...ka,kac->...c", pairs, jnp.asarray(chosen, pairs.dtype))


def wide(x: Array) -> Array:
  """Halves in float32, in which their sums and statistics are taken; all else as it is."""
  return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


class LayerNorm(nn.Module):
  """nn.LayerNorm over the last axis, biased variance. linen's own mixes dtypes for halves."""

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    row = (*(1,) * (x.ndim - 1), -1)
    given, x, scale, bias = x.dtype, wide(x), wide(scale).reshape(row), wide(bias).reshape(row)
    return (normalized(x, self.epsilon)[0] * scale + bias).astype(given)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalized(x: Array, epsilon: float) -> tuple[Array, Array]:
  """Rows of mean 0 and variance 1, and what they were multiplied by: (x - mean) · r, and r.

  Both have derivatives in terms of themselves, of any order, with half of the sums that JAX makes
  of those of mean and variance.

  Args:
    x: [..., D].
    epsilon: r = 1 / sqrt(variance + epsilon).

  Returns:
    [..., D] and [..., 1].
  """
  centered = x - x.mean(-1, keepdims=True)
  factor = jax.lax.rsqrt(jax.lax.square(centered).mean(-1, keepdims=True) + epsilon)
  return centered * factor, factor


@normalized.defjvp
def _(epsilon, primals, tangents):
  y, factor = normalized(*primals, epsilon)
  moved = tangents[0] * factor
  along = (y * moved).mean(-1, keepdims=True)
  return (y, factor), (moved - moved.mean(-1, keepdims=True) - y * along, -factor * along)


class Dropout(nn.Module):
  """Drops entries where `apply` got a "dropout" key, and is the identity elsewhere."""

  rate: Any  # a number; of several towers an array [], see `together`

  @property
  def acts(self) -> bool:
    """Whether it may drop anything here."""
    return self.has_rng("dropout") and not (isinstance(self.rate, (int, float)) and self.rate == 0)

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if not isinstance(self.rate, jax.Array):
      return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)
    if not self.acts:
      return x
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
    return jnp.where(keep, x / (1 - self.rate).astype(x.dtype), 0)


class Conv1d(nn.Module):
  """nn.Conv1d, `padding` zeros at both ends: [B, L, D] -> [B, L - width + 1 + 2 padding, features].

  A sum of shifted matrix products: XLA's own convolution is slow by orders of magnitude in a
  compiled loop on a CPU, where every training epoch runs.
  """

  features: int
  width: int
  kernel_init: Callable | None = None  # PyTorch's own by default
  use_bias: bool = True
  padding: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    chex.assert_rank(x, 3)
    x = jnp.pad(x, ((0, 0), (self.padding, self.padding), (0, 0)))
    steps = x.shape[1] - self.width + 1
    init = self.kernel_init or uniform(1 / math.sqrt(self.width * x.shape[-1]))
    kernel = self.param("kernel", init, (self.width, x.shape[-1], self.features))
    y: Any = sum(x[:, n : n + steps] @ kernel[n] for n in range(self.width))
    if self.use_bias:
      y = y + _last(self.param("bias", nn.initializers.zeros, (self.features,)), y.ndim)
    return y


def gelu(x: Array) -> Array:
  """nn.GELU, x Φ(x), by erf as PyTorch has it: JAX's erfc takes a TPU twice as long to compile."""
  y = wide(x)
  return (y * (jax.lax.erf(y * math.sqrt(0.5)) + 1) * 0.5).astype(x.dtype)


class BatchNorm(nn.Module):
  """nn.BatchNorm1d over [B, D]: linen's keeps a biased variance, PyTorch's an unbiased one.

  Running statistics are in the collection "batch_stats"; `train` normalizes by the batch.
  """

  momentum: float = 0.1  # weight of the batch in the running statistics
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    chex.assert_rank(x, 2)
    (rows, width), given = x.shape, x.dtype
    x = wide(x)
    mean = self.variable("batch_stats", "mean", jnp.zeros, width)
    var = self.variable("batch_stats", "var", jnp.ones, width)
    now, spread = mean.value, var.value
    if train:
      now, spread = x.mean(0), x.var(0)
      if not self.is_initializing():
        mean.value += self.momentum * (now - mean.value)
        var.value += self.momentum * (spread * rows / max(rows - 1, 1) - var.value)
    scale = self.param("scale", nn.initializers.ones, (width,))
    bias = self.param("bias", nn.initializers.zeros, (width,))
    now, spread, scale, bias = (a[None] for a in (now, spread, wide(scale), wide(bias)))
    return ((x - now) / jnp.sqrt(spread + self.epsilon) * scale + bias).astype(given)


class LSTM(nn.Module):
  """One direction of nn.LSTM: gates i, f, g, o and two biases.

  Two biases, since inner SGD moves both: one fused bias would move half as far and the
  meta-gradient would differ. Padding never changes the state, which equals PyTorch's packed
  sequences; backwards, the state stays zero until the last valid step.

  Attributes:
    features: H.
    reverse: scan from the last step to the first.
    recurrent_init: of w_hh; U(±1/√H) by default.
  """

  features: int
  reverse: bool = False
  recurrent_init: Callable | None = None

  @nn.compact
  def weights(self, width: int) -> recurrence.Weights:
    """(w_ih [D, 4H], w_hh [H, 4H], the sum of both biases [4H]) for D = `width`."""
    hidden, init = self.features, uniform(1 / math.sqrt(self.features))
    w_ih = self.param("w_ih", init, (width, 4 * hidden))
    w_hh = self.param("w_hh", self.recurrent_init or init, (hidden, 4 * hidden))
    bias = self.param("b_ih", init, (4 * hidden,)) + self.param("b_hh", init, (4 * hidden,))
    return w_ih, w_hh, bias

  def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, Array]:
    """Runs over a sequence.

    Args:
      x: [B, L, D].
      valid: [B, L] bool; None runs through every step (an unpacked LSTM).

    Returns:
      Outputs [B, L, H], zero on padding, and the final state h [B, H].
    """
    chex.assert_rank(x, 3)
    outputs, final = recurrence.lstm(
      x.swapaxes(0, 1), _valid_steps(x, valid), *self.weights(x.shape[-1]), reverse=self.reverse
    )
    return outputs.swapaxes(0, 1), final


def _valid_steps(x: Array, valid: Array | None) -> Array:
  """[L, B], all True where `valid` is None."""
  if valid is None:
    valid = jnp.ones(x.shape[:2], bool)
  chex.assert_shape(valid, x.shape[:2])
  return valid.T


class BiLSTM(nn.Module):
  """Bidirectional nn.LSTM of one layer; `features` is H per direction, see `LSTM`."""

  features: int
  recurrent_init: Callable | None = None

  @nn.compact
  def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, tuple[Array, Array]]:
    """[B, L, D] -> outputs [B, L, 2H] and the final states (forward, backward), [B, H] each."""
    chex.assert_rank(x, 3)
    forward, backward = (
      LSTM(self.features, recurrent_init=self.recurrent_init, name=name).weights(x.shape[-1])
      for name in ("forward", "backward")
    )
    outputs, finals = recurrence.bilstm(x.swapaxes(0, 1), _valid_steps(x, valid), forward, backward)
    return jnp.concatenate(outputs, -1).swapaxes(0, 1), finals


class GRU(nn.Module):
  """One direction of nn.GRU: gates r, z, n and two biases; padding as in `LSTM`.

  Attributes:
    features: H.
    reverse: scan from the last step to the first.
    recurrent_init: of w_hh; U(±1/√H) by default.
  """

  features: int
  reverse: bool = False
  recurrent_init: Callable | None = None

  @nn.compact
  def weights(self, width: int) -> recurrence.GruWeights:
    """(w_ih [D, 3H], w_hh [H, 3H], two biases [3H]) for D = `width`."""
    hidden, init = self.features, uniform(1 / math.sqrt(self.features))
    w_ih = self.param("w_ih", init, (width, 3 * hidden))
    w_hh = self.param("w_hh", self.recurrent_init or init, (hidden, 3 * hidden))
    b_ih, b_hh = (self.param(name, init, (3 * hidden,)) for name in ("b_ih", "b_hh"))
    return w_ih, w_hh, b_ih, b_hh

  def __call__(self, x: Array, valid: Array) -> Array:
    """x [B, L, D], valid [B, L] -> outputs [B, L, H], zero on padding."""
    return recurrence.gru(x, valid, *self.weights(x.shape[-1]), reverse=self.reverse)


class BiGRU(nn.Module):
  """Bidirectional nn.GRU of several layers without dropout; `features` is H per direction."""

  features: int
  depth: int
  recurrent_init: Callable | None = None

  @nn.compact
  def __call__(self, x: Array, valid: Array) -> Array:
    """[B, L, D] -> [B, L, 2H]."""
    for n in range(self.depth):
      forward, backward = (
        GRU(self.features, recurrent_init=self.recurrent_init, name=name).weights(x.shape[-1])
        for name in (f"forward_{n}", f"backward_{n}")
      )
      x = jnp.concatenate(recurrence.bigru(x, valid, forward, backward), -1)
    return x


def attend(
  query: Array,
  key: Array,
  value: Array,
  bias: Array | None = None,
  drop: Dropout | None = None,
  scale: float | None = None,
) -> Array:
  """drop(softmax(scale · q kᵀ + bias)) v of each head, the softmax in float32 at least.

  By `jax.nn.dot_product_attention` where it computes the same: in float32, nothing being dropped.
  It drops no weights; the gradients of its halves are products of float32 by bfloat16; and of
  float64 it takes the softmax in float32.

  Args:
    query: [B, L, N, c], N heads.
    key, value: [B, M, N, c].
    bias: broadcasts against [B, N, L, M].
    drop: dropout of the weights.
    scale: 1 / √c by default.

  Returns:
    [B, L, N · c].
  """
  if query.dtype == jnp.float32 and not (drop and drop.acts):
    y = jax.nn.dot_product_attention(query, key, value, bias, scale=scale)
  else:
    q, k, v = (a.swapaxes(1, 2) for a in (query, key, value))
    logits = wide(jnp.einsum("bnlc,bnmc->bnlm", q, k))
    logits = logits / math.sqrt(q.shape[-1]) if scale is None else scale * logits
    weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1).astype(v.dtype)
    y = jnp.einsum("bnlm,bnmc->bnlc", drop(weights) if drop else weights, v).swapaxes(1, 2)
  return y.reshape(*y.shape[:2], -1)


def attention_bias(allowed: Array) -> Array:
  """What is added to the logits of `attend`: 0 where a query may attend, else almost -∞.

  Not -inf: a row that may attend to nothing, as a row of padding, must not become NaN.
  """
  return jnp.where(allowed, 0.0, jnp.finfo(jnp.float32).min)


class MultiHeadAttention(nn.Module):
  """nn.MultiheadAttention with its fused input projection (kernel [D, 3D]: q, k, v).

  Attributes:
    heads: number of heads; they split D.
    dropout: of the attention weights.
    out_init: of the output's kernel; U(±1/√D) by default.
  """

  heads: int
  dropout: float = 0.0
  out_init: Callable | None = None

  @nn.compact
  def __call__(
    self,
    query: Array,
    key: Array | None = None,
    value: Array | None = None,
    *,
    valid: Array | None = None,
    mask: Array | None = None,
  ) -> Array:
    """Attends.

    Args:
      query: [B, L, D].
      key: [B, M, D], `query` by default.
      value: [B, M, D], `key` by default.
      valid: [B, M] bool, False on keys that nobody attends to.
      mask: [L, M] bool, False where a query may not attend to a key.

    Returns:
      [B, L, D].
    """
    key = query if key is None else key
    value = key if value is None else value
    width = query.shape[-1]
    kernel = self.param("in_kernel", xavier_uniform, (width, 3 * width))
    bias = self.param("in_bias", nn.initializers.zeros, (3 * width,))

    # one product for what reads one x: all three, or keys and values
    of = query, key, value
    starts = [n for n in range(3) if n == 0 or of[n] is not of[n - 1]]
    cuts = [n * width for n in starts[1:]]
    heads = []
    for n, w, b in zip(starts, jnp.split(kernel, cuts, -1), jnp.split(bias, cuts), strict=True):
      y = of[n] @ w + _last(b, 3)
      heads += [a.reshape(*a.shape[:2], self.heads, -1) for a in jnp.split(y, len(b) // width, -1)]

    allowed = jnp.ones((1, 1, 1, 1), bool)
    if valid is not None:
      allowed = allowed & valid[:, None, None, :]
    if mask is not None:
      allowed = allowed & mask[None, None]
    q, k, v = heads
    y = attend(q, k, v, attention_bias(allowed), Dropout(self.dropout))
    out_init = self.out_init or uniform(1 / math.sqrt(width))
    out_kernel = self.param("out_kernel", out_init, (width, width))
    out_bias = self.param("out_bias", nn.initializers.zeros, (width,))
    return y @ out_kernel + _last(out_bias, 3)


class TransformerEncoderLayer(nn.Module):
  """nn.TransformerEncoderLayer: post-norm, ReLU.

  Attributes:
    heads: number of attention heads.
    feedforward: width of the hidden layer.
    dropout: of the attention weights, the hidden layer and both residual branches.
  """

  heads: int
  feedforward: int = 2048
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x: Array, valid: Array | None = None) -> Array:
    """[B, L, D] -> [B, L, D]; `valid` [B, L] marks the steps that are attended to."""
    y = MultiHeadAttention(self.heads, self.dropout, name="attention")(x, valid=valid)
    x = LayerNorm(name="norm1")(x + Dropout(self.dropout)(y))
    y = Dropout(self.dropout)(jax.nn.relu(Dense(self.feedforward, name="linear1")(x)))
    y = Dropout(self.dropout)(Dense(x.shape[-1], name="linear2")(y))
    return LayerNorm(name="norm2")(x + y)


@jax.custom_vjp
def reverse_gradient(x: Array, scale: float = 1.0) -> Array:
  """The identity whose gradient is multiplied by -scale (Ganin & Lempitsky 2015).

  A custom rule, since `stop_gradient(2x) - x` has a wrong second-order gradient.

  Args:
    x: [...].
    scale: of the reversed gradient; it gets no gradient itself.

  Returns:
    x.
  """
  del scale
  return x


def _reverse_forward(x, scale):
  return x, scale


def _reverse_backward(scale, cotangent):
  return -scale * cotangent, jnp.zeros_like(scale)


reverse_gradient.defvjp(_reverse_forward, _reverse_backward)


def prediction(scores: Array) -> Array:
  """A head's scores [B, C] as "prediction": logits [B, C], or values [B] if there is one output."""
  return scores[:, 0] if scores.shape[1] == 1 else scores


def mean_over_steps(x: Array, valid: Array) -> Array:
  """[B, L, D] -> [B, D]: the sum of the valid steps over their number (0 if there is none)."""
  weight = wide(valid.astype(x.dtype))  # a half does not count beyond 256
  total = wide(jnp.einsum("bl,bld->bd", weight.astype(x.dtype), x))
  return (total / jnp.maximum(weight.sum(1, keepdims=True), 1)).astype(x.dtype)


POOLINGS = ("first", "mean")


def check_pooling(pooling: str) -> None:
  """Raises ValueError for a pooling that `pool` does not know."""
  if pooling not in POOLINGS:
    raise ValueError(f"pooling is {pooling!r}, expected one of {POOLINGS}.")


def pool(x: Array, valid: Array, pooling: str) -> Array:
  """[B, L, D] -> [B, D]: the "first" step ([CLS]) or the "mean" of the valid steps."""
  check_pooling(pooling)
  return x[:, 0] if pooling == "first" else mean_over_steps(x, valid)
