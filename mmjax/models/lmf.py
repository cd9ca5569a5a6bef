"""LMF: low-rank multimodal fusion (Liu et al. 2018).

TFN whose weights of the outer product are a sum of `rank` products of one factor for each
modality, so that the product itself is never made.

Paper: https://arxiv.org/abs/1806.00064. Parity: MMSA's implementation and its quirks: those of
TFN's subnetworks, and the weights and the bias of the sum keep their initial values.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, systems, types
from mmjax.models import tfn

Array = types.Array


class Fusion(nn.Module):
  """[rank, B, C] -> [B, C]: a weighted sum and a bias; of K binary problems their joint logits."""

  shape: tuple[int, ...]  # of the outputs

  @nn.compact
  def __call__(self, x: Array) -> Array:
    rank, shape = len(x), self.shape
    weights = self.param("weights", layers.normal(math.sqrt(2 / (rank + 1))), (1, rank))
    bias = self.param("bias", nn.initializers.zeros, (1, *shape) if len(shape) == 1 else shape)
    scores = jnp.einsum("r,rbc->bc", weights[0], x) + bias.reshape(1, -1)
    return scores if len(shape) == 1 else layers.joint(scores)


class Lmf(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    hidden_sizes: width of the text's LSTM and of the audio and the vision network; the text's
      vector is half as wide as its LSTM.
    rank: of the weights.
    input_dropout: of the audio's and the vision's means.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  hidden_sizes: Sequence[int] = (128, 16, 128)
  rank: int = 3
  input_dropout: Sequence[float] = (0.3, 0.3)
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, train: bool) -> dict[str, Array]:
    out = tfn.encode(self, batch, train, self.hidden_sizes[0] // 2)
    products, outputs = [], layers.outputs(self.num_outputs)
    for name in types.MODALITIES:
      x = tfn.with_one(out[name])
      shape = (self.rank, x.shape[1], math.prod(outputs))
      # PyTorch's xavier_normal_ of such a shape
      std = math.sqrt(2 / ((shape[0] + shape[1]) * shape[2]))
      factor = self.param(f"{name}_factor", layers.normal(std), shape)
      products.append(jnp.einsum("bd,rdc->rbc", x, factor))
    product = products[0] * products[1] * products[2]
    scores = Fusion(outputs, name="fusion")(product)
    feature = jnp.swapaxes(product, 0, 1).reshape(scores.shape[0], -1)
    return {**out, "feature": feature, "prediction": layers.prediction(scores)}


@systems.configurable(Lmf)
def make(network: Lmf) -> types.System:
  """LMF as a system; the defaults are MMSA's for MOSI.

  Args:
    network: settings of `Lmf`.

  Returns:
    The system. Its one phase, "main", logs the part task.
  """
  return systems.supervised(
    network,
    tfn.loss,
    head="fusion",
    collections=("batch_stats",),
    trains="^(?!fusion/)",  # as published, by an index into the list of parameters
    hessian="symmetric",
  )


TORCH_RULES = (
  *tfn.SUBNET_RULES,
  (r"video_factor", "vision_factor"),
  (r"(text|audio)_factor", r"\1_factor"),
  (r"fusion_(weights|bias)", r"fusion/\1"),
)
