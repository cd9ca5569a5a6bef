"""Transformer blocks of ALMT (Zhang et al. 2023), which LNLN (Zhang et al. 2024) builds on.

Pre-norm blocks without a final norm, with a LayerNorm each for queries, keys and values; no
padding mask anywhere. Learnable tokens in front of a sequence gather what is kept of it.
"""

import flax.linen as nn
import jax.numpy as jnp

from mmjax import batched, layers, torch_import, types

Array = types.Array
HEAD = 64  # width of a head, whatever the model's width
POSITIONS = layers.normal(1.0)


def attend(query: Array, key: Array, value: Array, heads: int) -> Array:
  """softmax(q kᵀ / √c) v over heads that split the last axis: [B, N, I], [B, M, I] -> [B, N, I]."""

  def split(x):
    return x.reshape(*x.shape[:2], heads, -1)

  return layers.attend(split(query), split(key), split(value))


class Attention(nn.Module):
  """Normed attention of `target` [B, N, D] to `source` [B, M, D]; heads are 64 wide."""

  heads: int

  @nn.compact
  def __call__(self, target: Array, source: Array) -> Array:
    width, inner = target.shape[-1], self.heads * HEAD

    normed = batched.together(
      [layers.LayerNorm(name=f"norm_{name}") for name in "qkv"],
      [(target,), (source,), (source,)],
    )
    q, k, v = batched.together(
      [layers.Dense(inner, use_bias=False, name=f"to_{name}") for name in "qkv"],
      [(x,) for x in normed],
    )
    y = attend(q, k, v, self.heads)
    if self.heads == 1 and width == HEAD:  # as published, nothing is projected back then
      return y
    return layers.Dense(width, name="to_out")(y)


class Block(nn.Module):
  """Attention to `source` (itself by default) and a hidden layer, each with a residual."""

  heads: int
  hidden_size: int

  @nn.compact
  def __call__(self, x: Array, source: Array | None = None) -> Array:
    x = x + Attention(self.heads, name="attention")(x, x if source is None else source)
    y = layers.LayerNorm(name="norm")(x)
    y = layers.gelu(layers.Dense(self.hidden_size, name="linear_1")(y))
    return x + layers.Dense(x.shape[-1], name="linear_2")(y)


class TokenTransformer(nn.Module):
  """Positions, `tokens` learnable tokens in front, then blocks.

  Attributes:
    depth, heads, hidden_size: of the blocks.
    tokens: number of tokens, 0 for none.
  """

  depth: int
  heads: int
  hidden_size: int
  tokens: int = 0

  @nn.compact
  def __call__(self, x: Array) -> list[Array]:
    """[B, L, D] -> the input and each block's output, [B, tokens + L, D]."""
    rows, length, width = x.shape
    if self.tokens:
      extra = self.param("extra_token", nn.initializers.zeros, (1, self.tokens, width))
      x = jnp.concatenate([jnp.broadcast_to(extra, (rows, self.tokens, width)), x], 1)
    x = x + self.param("pos_embedding", POSITIONS, (1, length + self.tokens, width))
    states = [x]
    for n in range(self.depth):
      states.append(Block(self.heads, self.hidden_size, name=f"layer_{n}")(states[-1]))
    return states


class HyperLearning(nn.Module):
  """Adaptive hyper-modality learning: text asks audio and vision, the answers are added up.

  The residual is the *normed* hyper-modality, as in the published code.

  Attributes:
    heads: of the attention; they split D.
  """

  heads: int

  @nn.compact
  def __call__(self, text: Array, audio: Array, vision: Array, hyper: Array) -> Array:
    """Text and hyper [B, T, D], audio and vision [B, N, D] -> hyper [B, T, D]."""
    width = hyper.shape[-1]
    text, audio, vision, hyper = batched.together(
      [layers.LayerNorm(name=f"norm{n}") for n in range(1, 5)],
      [(x,) for x in (text, audio, vision, hyper)],
    )
    asked = {"to_q": text, "to_k_ta": audio, "to_k_tv": vision, "to_v_ta": audio, "to_v_tv": vision}
    q, *found = batched.together(
      [layers.Dense(width, use_bias=False, name=name) for name in asked],
      [(x,) for x in asked.values()],
    )
    # the heads of both questions side by side: one attention
    query, key, value = (jnp.concatenate(pair, -1) for pair in ((q, q), found[:2], found[2:]))
    of_audio, of_vision = jnp.split(attend(query, key, value, 2 * self.heads), 2, -1)
    y = of_audio + of_vision
    return hyper + (y if self.heads == 1 else layers.Dense(width, name="to_out")(y))


class CrossTransformer(nn.Module):
  """A token in front of both sequences; the target's blocks attend to the source."""

  depth: int
  heads: int
  hidden_size: int

  @nn.compact
  def __call__(self, source: Array, target: Array) -> Array:
    """Source [B, M, D], target [B, N, D] -> [B, 1 + N, D]."""
    rows, _, width = source.shape
    token = self.param("extra_token", nn.initializers.zeros, (1, 1, width))
    token = jnp.broadcast_to(token, (rows, 1, width))

    def prepare(x, name):
      x = jnp.concatenate([token, x], 1)
      return x + self.param(f"pos_embedding_{name}", POSITIONS, (1, x.shape[1], width))

    source, x = prepare(source, "s"), prepare(target, "t")
    for n in range(self.depth):
      x = Block(self.heads, self.hidden_size, name=f"layer_{n}")(x, source)
    return x


def transformer_rules(prefix: str, path: str) -> torch_import.Rules:
  """Rules for a published (cross) transformer at the regex `prefix`, as `path`."""
  layer = prefix + r"\.(?:encoder|CrossTransformerEncoder)\.layers\.(\d+)"
  return (
    (prefix + r"\.(pos_embedding\w*|extra_token)", rf"{path}/\1"),
    (layer + r"\.0\.(norm_[qkv])\.(weight|bias)", rf"{path}/layer_\1/attention/\2/\3"),
    (layer + r"\.0\.fn\.(to_[qkv])\.weight", rf"{path}/layer_\1/attention/\2/weight"),
    (layer + r"\.0\.fn\.to_out\.0\.(weight|bias)", rf"{path}/layer_\1/attention/to_out/\2"),
    (layer + r"\.1\.norm\.(weight|bias)", rf"{path}/layer_\1/norm/\2"),
    (layer + r"\.1\.fn\.net\.0\.(weight|bias)", rf"{path}/layer_\1/linear_1/\2"),
    (layer + r"\.1\.fn\.net\.3\.(weight|bias)", rf"{path}/layer_\1/linear_2/\2"),
  )


def hyper_rules(prefix: str, path: str) -> torch_import.Rules:
  """Rules for the published stack of hyper-modality layers: layer n is `path`_n."""
  layer = prefix + r"\.layers\.(\d+)\.0"
  return (
    (layer + r"\.(norm\d)\.(weight|bias)", rf"{path}_\1/\2/\3"),
    (layer + r"\.fn\.(to_[qkv]\w*)\.weight", rf"{path}_\1/\2/weight"),
    (layer + r"\.fn\.to_out\.0\.(weight|bias)", rf"{path}_\1/to_out/\2"),
  )
