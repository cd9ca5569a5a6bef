"""CubeMLP: MLPs that mix steps, modalities and channels in turn (Sun et al. 2022).

Each modality becomes a sequence of T steps and D channels; the three are stacked to a cube of
steps × modalities × channels. A block mixes the cube along each of its three axes by a small MLP
beside a residual. The cube that is left after the blocks predicts.

Paper: https://arxiv.org/abs/2207.14087. Parity: the authors' implementation and its quirks. They
have complete, word-aligned data alone: a zeroed frame is no missing one to their code, which
writes 1e-6 into it and encodes it. That is left as it is for single frames; a modality of which
nothing is seen enters the cube as zeros here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, systems, torch_import, types

Array = types.Array
ENCODERS = ("gru", "lstm", "conv")
PACKS = ("text", "own")
COMPOSE = ("mean", "cat")
HEAD = 128  # the widest feature that one layer predicts from, and the hidden width beyond
EPS = 1e-6  # of the norms; and what stands in frames of zeros
GRU_DEPTH = 2


def _norm(name: str) -> nn.Module:
  return layers.LayerNorm(epsilon=EPS, name=name)


class Mixer(nn.Module):
  """An MLP along one axis of the cube, beside a residual; the axis's size becomes `out`.

  Attributes:
    axis: 1 (steps), 2 (modalities) or 3 (channels).
    hidden, out: widths.
    dropout: of the MLP's output.
    use_bias: of the MLP's layers.
    norm_first: whether the MLP's input is normalized along the axis, or else the sum.
    project: whether the residual is mapped to the new size; otherwise the size must stay.
  """

  axis: int
  hidden: int
  out: int
  dropout: float
  use_bias: bool
  norm_first: bool
  project: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = jnp.moveaxis(x, self.axis, -1)
    if not self.project and x.shape[-1] != self.out:
      raise ValueError(
        f"out_sizes: axis {self.axis} of the cube has size {x.shape[-1]} and would get"
        f" {self.out}; only a block that projects can change a size."
      )
    y = _norm("norm")(x) if self.norm_first else x
    y = layers.gelu(layers.Dense(self.hidden, self.use_bias, name="fc1")(y))
    y = layers.Dropout(self.dropout)(layers.Dense(self.out, self.use_bias, name="fc2")(y))
    y = y + (layers.Dense(self.out, use_bias=False, name="project")(x) if self.project else x)
    y = y if self.norm_first else _norm("norm")(y)
    return jnp.moveaxis(y, -1, self.axis)


def centred(x: Array, length: int) -> Array:
  """[B, L, D] with zeros around it, the smaller half first; as it is if it is long enough."""
  missing = max(length - x.shape[1], 0)
  return jnp.pad(x, ((0, 0), (missing // 2, missing - missing // 2), (0, 0)))


def _fit(x: Array, length: int) -> Array:
  """[B, L, ...] cut at the end, or filled up with zeros (False), to `length` steps."""
  x = x[:, :length]
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def compose(x: Array, steps: str, modalities: str) -> Array:
  """The cube [B, L, K, D] as features [B, F].

  Args:
    x: the cube.
    steps, modalities: what becomes of the axis: its "mean", or "cat"; an entry stands at
      modality · (L D) + step · D + channel.

  Returns:
    The features.
  """
  x = x.mean(1) if steps == "mean" else jnp.swapaxes(x, 1, 2).reshape(*x.shape[:1], x.shape[2], -1)
  return x.mean(1) if modalities == "mean" else x.reshape(x.shape[0], -1)


class CubeMlp(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    steps: T; longer sequences lose their end.
    size: D, channels of the first cube.
    encoder: of audio and vision: "gru" (two layers), "lstm" (one), both in two directions that
      are added up, or "conv" over three steps.
    pack: how many steps of audio and vision the recurrences read. "text": as many as the text
      has, as published; shorter sequences are centred in the text's L steps before, so that what
      is pushed beyond a sample's own length is lost. (L is the dataset's here, the longest of the
      batch there.) "own": each as many as it has, not centred: for data that are not aligned to
      words.
    hidden_sizes, out_sizes: of each block: width of the hidden layer, and size of the axis that
      comes out, of steps, modalities, channels.
    project: of each block, whether its residuals are mapped to the new sizes.
    use_bias: of the MLPs' layers.
    norm_first: whether MLPs normalize their input, or else the sum with the residual. (That of
      two modalities is ±1 with almost no gradient.)
    compose_steps, compose_modalities: "mean" or "cat", see `compose`; the authors' "sum" is a mean.
    mixer_dropout: of the MLPs along steps, modalities, channels.
    dropout: of encoded text, audio, vision, and of the head's hidden layer.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  steps: int = 100
  size: int = 128
  encoder: str = "gru"
  pack: str = "text"
  hidden_sizes: Sequence[Sequence[int]] = ((50, 3, 128), (10, 3, 32))
  out_sizes: Sequence[Sequence[int]] = ((50, 3, 128), (10, 3, 32))
  project: Sequence[bool] = (True, True)
  use_bias: bool = True
  norm_first: bool = True
  compose_steps: str = "mean"
  compose_modalities: str = "cat"
  mixer_dropout: Sequence[float] = (0.1, 0.1, 0.1)
  dropout: Sequence[float] = (0.1, 0.1, 0.1, 0.1)
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    states = bert_lib.text_states(self.bert.config, batch)
    out = {"text": layers.Dense(self.size, use_bias=False, name="text")(states)}
    for name in types.MODALITIES[1:]:
      out[name] = self._encode(name, getattr(batch, name), batch.text.valid)

    cube = []
    for name, rate in zip(types.MODALITIES, self.dropout[:3], strict=True):
      x = _fit(layers.Dropout(rate)(out[name]), self.steps)
      seen = masking.present(getattr(batch, name))
      cube.append(jnp.where(seen[:, None, None], x, 0))
    x = out["cube"] = jnp.stack(cube, 2)

    blocks = zip(self.hidden_sizes, self.out_sizes, self.project, strict=True)
    for n, (hidden, sizes, project) in enumerate(blocks):
      for axis in (1, 2, 3):
        x = Mixer(
          axis,
          hidden[axis - 1],
          sizes[axis - 1],
          self.mixer_dropout[axis - 1],
          self.use_bias,
          self.norm_first,
          project,
          name=f"block_{n}_{'lkd'[axis - 1]}",
        )(x)
      out[f"block_{n}"] = x

    y = feature = compose(x, self.compose_steps, self.compose_modalities)
    if feature.shape[1] > HEAD:
      y = jax.nn.relu(layers.Dense(HEAD, name="hidden")(feature))
      y = layers.Dropout(self.dropout[3])(y)
    scores = layers.Dense(self.num_outputs, name="head")(y)
    return {**out, "feature": feature, "prediction": layers.prediction(scores)}

  def _encode(self, name: str, m: types.Modality, text_valid: Array) -> Array:
    """[B, L, size] of audio or vision."""
    x, valid = masking.observed(m), m.valid
    if self.pack == "text":
      length = text_valid.shape[1]
      x = centred(x, length)
      valid = _fit(text_valid, x.shape[1])
      empty = (x == 0).all(-1) & valid
      x = jnp.where(empty[..., None], jnp.asarray(EPS, x.dtype), x)
    orthogonal = nn.initializers.orthogonal()
    if self.encoder == "conv":
      y = layers.Conv1d(self.size, 3, padding=1, name=f"{name}_conv")(x)
    elif self.encoder == "gru":
      both = layers.BiGRU(self.size, GRU_DEPTH, orthogonal, name=f"{name}_rnn")(x, valid)
      y = both[..., : self.size] + both[..., self.size :]
    else:
      both, _ = layers.BiLSTM(self.size, orthogonal, name=f"{name}_rnn")(x, valid)
      y = both[..., : self.size] + both[..., self.size :]
    return jax.nn.relu(_norm(f"{name}_norm")(y))


def _simse(error: Array) -> Array:
  return (error.sum() / len(error)) ** 2


# Of the differences [B] between values and labels.
REGRESSION = {
  "mae": lambda error: jnp.abs(error).mean(),
  "mse": lambda error: (error**2).mean(),
  "rmse": lambda error: jnp.sqrt((error**2).mean()),
  "simse": _simse,
}


@systems.configurable(CubeMlp)
def make(network: CubeMlp, *, regression: str = "mae") -> types.System:
  """CubeMLP as a system; the defaults are those of the authors' run on MOSI.

  Args:
    network: settings of `CubeMlp`.
    regression: the loss of values: "mae", "mse", "rmse" or "simse", the square of the mean error.
      Classes have the cross-entropy.

  Returns:
    The system. Its one phase, "main", logs the part task.
  """
  for name, allowed in (
    ("encoder", ENCODERS),
    ("pack", PACKS),
    ("compose_steps", COMPOSE),
    ("compose_modalities", COMPOSE),
  ):
    if getattr(network, name) not in allowed:
      raise ValueError(f"{name} is {getattr(network, name)!r}, expected one of {allowed}.")
  if regression not in REGRESSION:
    raise ValueError(f"regression is {regression!r}, expected one of {tuple(REGRESSION)}.")
  if not len(network.hidden_sizes) == len(network.out_sizes) == len(network.project) > 0:
    raise ValueError("hidden_sizes, out_sizes and project must have an entry for each block.")

  def loss(out, batch, extra):
    prediction = out["prediction"]
    if prediction.ndim == 1:
      error = REGRESSION[regression](prediction - batch.label)
    else:
      error = losses.task(prediction, batch.label).mean()
    return error, types.Aux({"task": error}, extra)

  return systems.supervised(network, loss, head="head", hessian="symmetric")


def torch_rules(settings: Mapping[str, Any]) -> torch_import.Rules:
  """Rules for the authors' state_dict."""
  rules = [
    *bert_lib.torch_rules(r"bertmodel\.", "bert"),
    (r"W_t\.weight", "text/weight"),
  ]
  for letter, name in (("a", "audio"), ("v", "vision")):
    at, to = rf"rnn_{letter}", f"{name}_rnn"
    gru = settings["encoder"] == "gru"
    rules += (
      torch_import.gru_rules(at, to) if gru else torch_import.lstm_rules(at, to, bidirectional=True)
    )
    rules.append((rf"conv_{letter}\.(weight|bias)", rf"{name}_conv/\1"))
    rules.append((rf"ln_{letter}\.(weight|bias)", rf"{name}_norm/\1"))
  at = r"mlp_encoder\.layers_stack\.(\d+)\."
  rules += [
    (at + r"mlp_(.)\.(fc\d)\.(weight|bias)", r"block_\1_\2/\3/\4"),
    (at + r"ln_(.)\.(weight|bias)", r"block_\1_\2/norm/\3"),
    (at + r"res_projection_(.)\.weight", r"block_\1_\2/project/weight"),
  ]
  steps, modalities, channels = settings["out_sizes"][-1]
  width = channels * math.prod(
    size
    for size, how in (
      (steps, settings["compose_steps"]),
      (modalities, settings["compose_modalities"]),
    )
    if how == "cat"
  )
  first = "hidden" if width > HEAD else "head"
  rules += [
    (r"classifier\.0\.(weight|bias)", rf"{first}/\1"),
    (r"classifier\.3\.(weight|bias)", r"head/\1"),
  ]
  return tuple(rules)
