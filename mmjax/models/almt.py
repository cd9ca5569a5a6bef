"""ALMT: language-guided hyper-modality learning (Zhang et al. 2023).

Each modality is condensed into a few tokens. Text, at several scales, asks audio and vision for
what matters to it and gathers the answers in a hyper-modality, to which the text attends at
the end.

Paper: https://arxiv.org/abs/2310.05804. Parity: MMSA's implementation and its quirks.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from mmjax import batched, hyper_layers, layers, losses, masking, systems, torch_import, types
from mmjax import bert as bert_lib

Array = types.Array


class Almt(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: D, width of all tokens.
    hidden_size: of the embeddings' hidden layers.
    tokens: T, tokens that stand for a modality.
    embedding_depth: blocks of each embedding.
    embedding_heads: their heads, for all or by modality.
    text_heads: heads of the text encoder.
    hyper_depth: scales of the text, hence hyper-modality layers.
    hyper_heads: their heads; they divide D.
    fusion_hidden_size, fusion_depth, fusion_heads: of the fusion.
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
  """

  num_outputs: int = 1
  size: int = 128
  hidden_size: int = 128
  tokens: int = 8
  embedding_depth: int = 1
  embedding_heads: Mapping[str, int] | int = 8
  text_heads: int = 8
  hyper_depth: int = 3
  hyper_heads: int = 8
  fusion_hidden_size: int = 128
  fusion_depth: int = 2
  fusion_heads: int = 8
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    states = bert_lib.text_states(self.bert.config, batch)
    inputs = {
      "text": states,
      "audio": masking.observed(batch.audio),
      "vision": masking.observed(batch.vision),
    }
    out, kept = {"text_states": states}, {}
    heads = self.embedding_heads
    embed = [
      hyper_layers.TokenTransformer(
        self.embedding_depth,
        heads if isinstance(heads, int) else heads[name],
        self.hidden_size,
        self.tokens,
        name=f"embed_{name}",
      )
      for name in inputs
    ]
    projected = [
      (layers.Dense(self.size, name=f"project_{name}")(x),) for name, x in inputs.items()
    ]
    for name, states in zip(inputs, batched.together(embed, projected), strict=True):
      out[f"embedded_{name}"] = states[-1]
      kept[name] = out[f"embedded_{name}"][:, : self.tokens]
    scales = hyper_layers.TokenTransformer(
      self.hyper_depth - 1, self.text_heads, self.size, name="text_encoder"
    )(kept["text"])
    hyper = self.param("hyper", nn.initializers.ones, (1, self.tokens, self.size))
    hyper = jnp.broadcast_to(hyper, kept["text"].shape)
    for n, text in enumerate(scales):
      layer = hyper_layers.HyperLearning(self.hyper_heads, name=f"hyper_{n}")
      hyper = layer(text, kept["audio"], kept["vision"], hyper)
      out |= {f"text_{n}": text, f"hyper_{n}": hyper}
    out["hyper"] = hyper
    out["fusion"] = hyper_layers.CrossTransformer(
      self.fusion_depth, self.fusion_heads, self.fusion_hidden_size, name="fusion"
    )(hyper, scales[-1])
    out["feature"] = out["fusion"][:, 0]
    scores = layers.Dense(self.num_outputs, name="head")(out["feature"])
    out["prediction"] = layers.prediction(scores)
    return out


@systems.configurable(Almt)
def make(network: Almt) -> types.System:
  """ALMT as a system; the settings are `Almt`'s, the defaults MMSA's for MOSI.

  Returns:
    The system. Its one phase, "main", logs the part mse (the task's loss).
  """
  size, heads = network.size, network.hyper_heads
  if size % heads:
    raise ValueError(f"size is {size}, but must be divisible by hyper_heads {heads}.")

  def loss(out, batch, extra):
    value = losses.task(out["prediction"], batch.label).mean()
    return value, types.Aux({"mse": value}, extra)

  return systems.supervised(network, loss, head="head", hessian="symmetric")


def _embedding_rules(name: str, letter: str) -> torch_import.Rules:
  return (
    (rf"embedding_{letter}\.0\.(weight|bias)", rf"project_{name}/\1"),
    *hyper_layers.transformer_rules(rf"embedding_{letter}\.1", f"embed_{name}"),
  )


TORCH_RULES = (
  *bert_lib.torch_rules(r"bertmodel\.model\.", "bert"),
  *_embedding_rules("text", "l"),
  *_embedding_rules("audio", "a"),
  *_embedding_rules("vision", "v"),
  (r"h_hyper", "hyper"),
  *hyper_layers.transformer_rules("l_encoder", "text_encoder"),
  *hyper_layers.hyper_rules("h_hyper_layer", "hyper"),
  *hyper_layers.transformer_rules("fusion_layer", "fusion"),
  (r"regression_head\.(weight|bias)", r"head/\1"),
)
