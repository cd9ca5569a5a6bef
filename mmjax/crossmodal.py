"""The crossmodal Transformer of MulT (Tsai et al. 2019), as TETFN, TFR-Net and DMD use it too."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import layers, torch_import, types

Array = types.Array


def sinusoids(x: Array) -> Array:
  """Positions 1 … L as [sin | cos] of x's width, [B, L, D].

  As published, a step whose first feature is exactly 0 counts as padding: its position is 0.
  """
  _, length, width = x.shape
  half = width // 2
  frequency = jnp.exp(-math.log(1e4) / (half - 1) * jnp.arange(half, dtype=float))
  angle = jnp.arange(1, length + 1, dtype=float)[:, None] * frequency[None]
  table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 1)
  table = jnp.pad(table, ((0, 0), (0, width % 2)))
  return jnp.where(x[:, :, :1] != 0, table[None], 0.0).astype(x.dtype)


def future(queries: int, keys: int) -> Array:
  """[queries, keys] bool, True where a query may attend: none looks ahead by more than |M - N|."""
  return ~jnp.triu(jnp.ones((queries, keys), bool), 1 + abs(keys - queries))


class CrossmodalLayer(nn.Module):
  """Pre-norm attention (one norm for queries, keys and values) and a ReLU layer of width 4D."""

  heads: int
  attention_dropout: float
  relu_dropout: float
  residual_dropout: float
  causal: bool
  xavier: bool

  @nn.compact
  def __call__(self, x: Array, source: Array | None) -> Array:
    drop = layers.Dropout(self.residual_dropout)
    norm = layers.LayerNorm(name="norm0")
    y = norm(x)
    source = y if source is None else norm(source)
    mask = future(x.shape[1], source.shape[1]) if self.causal else None
    init, dense = None, layers.Dense
    if self.xavier:
      init = layers.xavier_uniform
      dense = functools.partial(nn.Dense, kernel_init=init)
    y = layers.MultiHeadAttention(
      self.heads, self.attention_dropout, out_init=init, name="attention"
    )(y, source, mask=mask)
    x = x + drop(y)
    y = jax.nn.relu(dense(4 * x.shape[-1], name="fc1")(layers.LayerNorm(name="norm1")(x)))
    y = layers.Dropout(self.relu_dropout)(y)
    return x + drop(dense(x.shape[-1], name="fc2")(y))


class CrossmodalTransformer(nn.Module):
  """Lets a sequence attend to another one (or itself), which stays as it came at every layer.

  Attributes:
    heads, depth: of the layers.
    attention_dropout, relu_dropout, residual_dropout, embedding_dropout: rates.
    causal: whether no step sees later ones.
    positions: whether sinusoids are added.
    xavier: whether all kernels start as the published ones do (and biases at 0), else as
      PyTorch's own layers.
  """

  heads: int
  depth: int
  attention_dropout: float = 0.0
  relu_dropout: float = 0.0
  residual_dropout: float = 0.0
  embedding_dropout: float = 0.0
  causal: bool = True
  positions: bool = False
  xavier: bool = False

  @nn.compact
  def __call__(self, x: Array, source: Array | None = None) -> Array:
    """x [B, N, D], source [B, M, D] -> [B, N, D]."""

    def embed(x):
      y = math.sqrt(x.shape[-1]) * x
      y = y + sinusoids(x) if self.positions else y
      return layers.Dropout(self.embedding_dropout)(y)

    x, source = embed(x), None if source is None else embed(source)
    for n in range(self.depth):
      x = CrossmodalLayer(
        self.heads,
        self.attention_dropout,
        self.relu_dropout,
        self.residual_dropout,
        self.causal,
        self.xavier,
        name=f"layer_{n}",
      )(x, source)
    return layers.LayerNorm(name="norm")(x)


def torch_rules(prefix: str, path: str) -> torch_import.Rules:
  """Rules for a published TransformerEncoder at the regex `prefix`, as `path`."""
  layer = prefix + r"\.layers\.(\d+)"
  return (
    (prefix + r"\.(version|embed_positions\._float_tensor)", None),
    (layer + r"\.self_attn\.in_proj_weight", rf"{path}/layer_\1/attention/in_kernel"),
    (layer + r"\.self_attn\.in_proj_bias", rf"{path}/layer_\1/attention/in_bias"),
    (layer + r"\.self_attn\.out_proj\.weight", rf"{path}/layer_\1/attention/out_kernel"),
    (layer + r"\.self_attn\.out_proj\.bias", rf"{path}/layer_\1/attention/out_bias"),
    (layer + r"\.(fc[12])\.(weight|bias)", rf"{path}/layer_\1/\2/\3"),
    (layer + r"\.layer_norms\.(\d)\.(weight|bias)", rf"{path}/layer_\1/norm\2/\3"),
    (prefix + r"\.layer_norm\.(weight|bias)", rf"{path}/norm/\1"),
  )
