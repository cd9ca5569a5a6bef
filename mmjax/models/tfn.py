"""TFN: the tensor fusion network (Zadeh et al. 2017).

Audio and vision are means over time that a small network maps to vectors, text is the last state
of an LSTM. The outer product of the three vectors, a constant 1 before each, holds every product
of up to three features, and a small head predicts from it.

Paper: https://arxiv.org/abs/1707.07250. Parity: MMSA's implementation and its quirks: means and
LSTM run through padding too, and a value lies within (-3, 3).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, systems, torch_import, types

Array = types.Array


class Subnet(nn.Module):
  """[B, L, D] -> [B, size]: the mean over all steps, normalized, through three ReLU layers."""

  size: int
  dropout: float

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = layers.BatchNorm(name="norm")(x.mean(1), train)
    x = layers.Dropout(self.dropout)(x)
    for n in (1, 2, 3):
      x = jax.nn.relu(layers.Dense(self.size, name=f"linear_{n}")(x))
    return x


class TextSubnet(nn.Module):
  """[B, L, D] -> [B, features]: the state of an LSTM of width `size` after the padding."""

  size: int
  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    _, final = layers.LSTM(self.size, name="rnn")(x)
    return layers.Dense(self.features, name="linear_1")(final)


def encode(network: nn.Module, batch: types.Batch, train: bool, text_size: int) -> dict[str, Array]:
  """The vectors of the modalities, by their names, as TFN and LMF have them.

  To be called inside of a network with settings `hidden_sizes`, `input_dropout` and `bert`.

  Args:
    network: that.
    batch: B samples.
    train: whether batch statistics normalize.
    text_size: width of the text's vector.

  Returns:
    [B, D] by modality; and "text_states" [B, L, D].
  """
  text, *sizes = network.hidden_sizes
  states = bert_lib.text_states(network.bert.config, batch)
  found = {"text": TextSubnet(text, text_size, name="text_subnet")(states)}
  for name, size, dropout in zip(types.MODALITIES[1:], sizes, network.input_dropout, strict=True):
    x = masking.observed(getattr(batch, name))
    found[name] = Subnet(size, dropout, name=f"{name}_subnet")(x, train)
  return {**found, "text_states": states}


def with_one(x: Array) -> Array:
  """[B, D] -> [B, 1 + D]."""
  return jnp.concatenate([jnp.ones_like(x[:, :1]), x], 1)


class Tfn(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    hidden_sizes: width of the text's LSTM and of the audio and the vision network.
    text_size: width of the text's vector.
    fusion_size: width of the head's hidden layers.
    input_dropout: of the audio's and the vision's means.
    fusion_dropout: of the outer product.
    output_range, output_shift: a value is sigmoid(score) · range + shift.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  hidden_sizes: Sequence[int] = (128, 32, 128)
  text_size: int = 32
  fusion_size: int = 64
  input_dropout: Sequence[float] = (0.3, 0.3)
  fusion_dropout: float = 0.5
  output_range: float = 6.0
  output_shift: float = -3.0
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, train: bool) -> dict[str, Array]:
    out = encode(self, batch, train, self.text_size)
    text, audio, vision = (with_one(out[name]) for name in types.MODALITIES)
    product = jnp.einsum("ba,bv,bt->bavt", audio, vision, text).reshape(text.shape[0], -1)
    hidden = layers.Dropout(self.fusion_dropout)(product)
    for n in (1, 2):
      hidden = jax.nn.relu(layers.Dense(self.fusion_size, name=f"post_fusion_{n}")(hidden))
    scores = layers.Dense(self.num_outputs, name="post_fusion_3")(hidden)
    # stored with the published parameters, but never trained
    scale, shift = (
      jax.lax.stop_gradient(self.param(name, nn.initializers.constant(value), (1,)))
      for name, value in (("output_range", self.output_range), ("output_shift", self.output_shift))
    )
    if self.num_outputs == 1:
      scores = jax.nn.sigmoid(scores) * scale[None] + shift[None]
    return {**out, "feature": product, "prediction": layers.prediction(scores)}


def loss(out: dict[str, Array], batch: types.Batch, extra: types.Extra):
  """An `OutputLoss`: the mean absolute error, or the cross-entropy; logged as "task"."""
  error = losses.task(out["prediction"], batch.label, "l1").mean()
  return error, types.Aux({"task": error}, extra)


@systems.configurable(Tfn)
def make(network: Tfn) -> types.System:
  """TFN as a system; the defaults are MMSA's for MOSI.

  Args:
    network: settings of `Tfn`.

  Returns:
    The system. Its one phase, "main", logs the part task.
  """
  return systems.supervised(
    network, loss, head="post_fusion_3", collections=("batch_stats",), hessian="symmetric"
  )


SUBNET_RULES = (
  *torch_import.lstm_rules(r"text_subnet\.rnn", "text_subnet/rnn", bidirectional=False),
  (r"text_subnet\.linear_1\.(weight|bias)", r"text_subnet/linear_1/\1"),
  *(
    rule
    for theirs, ours in (("audio", "audio_subnet"), ("video", "vision_subnet"))
    for rule in (
      (rf"{theirs}_subnet\.norm\.running_(mean|var)", rf"batch_stats/{ours}/norm/\1"),
      (rf"{theirs}_subnet\.norm\.num_batches_tracked", None),
      (rf"{theirs}_subnet\.(norm|linear_\d)\.(weight|bias)", rf"{ours}/\1/\2"),
    )
  ),
)
TORCH_RULES = (
  *SUBNET_RULES,
  (r"(output_range|output_shift)", r"\1"),
  (r"post_fusion_layer_(\d)\.(weight|bias)", r"post_fusion_\1/\2"),
)
