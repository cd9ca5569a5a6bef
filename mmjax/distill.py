"""What HRLF and CorrKD share: an encoder of sequences, and what binds a student to its teacher.

Equations are those of HRLF (Li et al. 2024, arXiv 2411.02793); "ours" says what it leaves open.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import layers, systems, types

Array = types.Array
WIDTH = 3  # of the temporal convolutions
NORMS = ("pre", "post")
NEGATIVES = ("all", "shift")


def positions(length: int, width: int) -> Array:
  """[L, D] sinusoids of the steps 0 … L - 1 (Vaswani et al. 2017), for an even width."""
  frequency = np.exp(-np.log(1e4) * np.arange(0, width, 2) / width)
  angle = np.arange(length)[:, None] * frequency
  return jnp.asarray(np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, width))


class EncoderLayer(nn.Module):
  """Self-attention and a ReLU layer, each with a residual and a norm before or after it."""

  heads: int
  feedforward: int
  dropout: float
  norm: str

  @nn.compact
  def __call__(self, x: Array, valid: Array) -> Array:
    def attend(x):
      return layers.MultiHeadAttention(self.heads, self.dropout, name="attention")(x, valid=valid)

    def transform(x):
      x = jax.nn.relu(layers.Dense(self.feedforward, name="linear1")(x))
      return layers.Dense(width, name="linear2")(layers.Dropout(self.dropout)(x))

    width, drop = x.shape[-1], layers.Dropout(self.dropout)
    for n, branch in enumerate((attend, transform), 1):
      norm = layers.LayerNorm(name=f"norm{n}")
      x = x + drop(branch(norm(x))) if self.norm == "pre" else norm(x + drop(branch(x)))
    return x


class SequenceEncoder(nn.Module):
  """[B, L, D] -> [B, L, size]: a temporal convolution, positions, Transformer layers (§3.2).

  What is missing is not masked: zeros go in, as in the paper. Padding is read by nobody.
  """

  size: int
  heads: int
  depth: int
  feedforward: int
  dropout: float
  norm: str

  @nn.compact
  def __call__(self, x: Array, valid: Array) -> Array:
    x = jnp.where(valid[..., None], x, 0)  # the convolution looks beyond the last step
    x = layers.Conv1d(self.size, WIDTH, use_bias=False, padding=WIDTH // 2, name="conv")(x)
    x = layers.Dropout(self.dropout)(x + positions(*x.shape[1:]).astype(x.dtype)[None])
    for n in range(self.depth):
      layer = EncoderLayer(self.heads, self.feedforward, self.dropout, self.norm, name=f"layer_{n}")
      x = layer(x, valid)
    return layers.LayerNorm(name="norm")(x) if self.norm == "pre" else x


class Mlp(nn.Module):
  """Linear – ReLU – Linear."""

  hidden: int
  size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return layers.Dense(self.size, name="out")(jax.nn.relu(layers.Dense(self.hidden, name="in")(x)))


class Statistics(nn.Module):
  """T(x, y) of a mutual information bound: three layers, the first one on [x; y] (ours)."""

  size: int

  @nn.compact
  def __call__(self, x: Array, y: Array) -> Array:
    """x [..., D] and y [..., D] of one rank, which broadcast -> [...]."""
    first = layers.Dense(self.size, name="x")(x)
    first = first + layers.Dense(self.size, use_bias=False, name="y")(y)
    return Mlp(self.size, 1, name="mlp")(jax.nn.relu(first))[..., 0]


def jensen_shannon(joint: Array, product: Array) -> Array:
  """E_joint[-sp(-T)] - E_product[sp(T)], a bound on the mutual information (Eq. 7).

  It is the one of Deep InfoMax (Hjelm et al. 2019): at most 2 JSD(joint ‖ product) - 2 log 2, with
  equality for T = log of the densities' ratio; -2 log 2 for T = 0.

  Args:
    joint: [...] T of pairs that belong together.
    product: [...] T of pairs that do not.

  Returns:
    [] the bound.
  """
  return -jax.nn.softplus(-joint).mean() - jax.nn.softplus(product).mean()


def information(
  statistics: Callable[[Array, Array], Array], x: Array, y: Array, negatives: str = "all"
) -> Array:
  """`jensen_shannon` of a batch: the rows of x and y that are a sample's belong together.

  Args:
    statistics: T, see `Statistics`.
    x, y: [K, B, D]; pairs of different k are none of either kind (ours).
    negatives: pairs that do not belong together: "all" of different samples, or each row of x
      with the "shift"-ed one of y, B pairs instead of B² - B.

  Returns:
    [] the bound.
  """
  rows = x.shape[1]
  if negatives == "shift":
    return jensen_shannon(statistics(x, y), statistics(x, jnp.roll(y, 1, axis=1)))
  every = statistics(x[:, :, None], y[:, None])  # [K, B, B]
  joint = jnp.diagonal(every, axis1=1, axis2=2)
  spread = jax.nn.softplus(every).sum() - jax.nn.softplus(joint).sum()
  pairs = max(len(x) * (rows * rows - rows), 1)
  return -jax.nn.softplus(-joint).mean() - spread / pairs


def bind(network: nn.Module, params: types.Params) -> Callable[..., Any]:
  """A small network as a function of its inputs."""
  return lambda *inputs: network.apply({"params": params}, *inputs)


def init_critics(
  key: types.PRNGKey, make: Callable[[int], nn.Module], widths: Sequence[int], inputs: int
) -> types.Params:
  """Parameters of a small network for each scale, {"scale_0": …}; it takes `inputs` [1, D]."""
  keys = jax.random.split(key, len(widths))
  shape = lambda width: jax.ShapeDtypeStruct((1, width), jnp.float32)  # noqa: E731
  return {
    f"scale_{n}": systems.initial(make(width), keys[n], *[shape(width)] * inputs)["params"]
    for n, width in enumerate(widths)
  }


def divergence(teacher: Array, student: Array) -> Array:
  """KL of the outputs: of softmax distributions, or of unit Gaussians around values (ours).

  Args:
    teacher, student: logits [B, C], or values [B].

  Returns:
    [] the mean over the samples of KL(teacher ‖ student).
  """
  if teacher.ndim == 1:
    return 0.5 * ((teacher - student) ** 2).mean()
  teacher, student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  return (jnp.exp(teacher) * (teacher - student)).sum(-1).mean()
