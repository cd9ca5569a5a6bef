"""TransM: TransModality, fusion by translating one modality into another (Wang et al. 2020).

A bidirectional GRU gives each modality's steps their context. Text and audio, and text and vision,
are translated into each other by a forward and a backward Transformer; what their encoders say and
the contexts are the joint representation. The translations must restore the inputs.

Paper: https://arxiv.org/abs/2009.02902, whose authors publish no code. The sizes and what else the
paper leaves open are a public re-implementation's (memory_translation.py of
Hulei-Levi/MultiModel-Sentiment) or, where they are called so, ours. It has no means of its own
against missing data: zeros go in, and the translations aim at the complete data.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import distill, layers, losses, masking, systems, types

Array = types.Array
QUERIES = ("target", "learned")
TARGETS = ("complete", "observed")
OTHERS = ("audio", "vision")  # what the text is translated into, and back
# Names of the translations, with the modality that each of them restores.
TRANSLATIONS = {"audio": "audio", "text_audio": "text", "vision": "vision", "text_vision": "text"}


class TransformerLayer(nn.Module):
  """Post-norm self-attention, attention to a memory if there is one, and a GELU layer."""

  heads: int
  feedforward: int
  dropout: float

  @nn.compact
  def __call__(self, x: Array, valid: Array, memory: Array | None, memory_valid: Array) -> Array:
    drop, width = layers.Dropout(self.dropout), x.shape[-1]

    def attention(name):
      return layers.MultiHeadAttention(self.heads, self.dropout, name=name)

    x = layers.LayerNorm(name="norm1")(x + drop(attention("attention")(x, valid=valid)))
    if memory is not None:
      y = attention("cross_attention")(x, memory, valid=memory_valid)
      x = layers.LayerNorm(name="norm2")(x + drop(y))
    y = drop(layers.gelu(layers.Dense(self.feedforward, name="linear1")(x)))
    return layers.LayerNorm(name="norm3")(x + drop(layers.Dense(width, name="linear2")(y)))


class Transformer(nn.Module):
  """An encoder, or a decoder where it is given a memory: [B, L, D] -> [B, L, D].

  No causal mask and no shift: a decoder reads its whole query side.
  """

  depth: int
  heads: int
  feedforward: int
  dropout: float

  @nn.compact
  def __call__(
    self, x: Array, valid: Array, memory: Array | None = None, memory_valid: Array | None = None
  ) -> Array:
    x = layers.Dropout(self.dropout)(x + distill.positions(*x.shape[1:]).astype(x.dtype)[None])
    for n in range(self.depth):
      layer = TransformerLayer(self.heads, self.feedforward, self.dropout, name=f"layer_{n}")
      x = layer(x, valid, memory, valid if memory_valid is None else memory_valid)
    return x


class TextStates(nn.Module):
  """`bert.text_states` as a module, so that one BERT reads the observed and the complete text."""

  bert: bert_lib.BertConfig

  @nn.compact
  def __call__(self, batch: types.Batch) -> Array:
    return bert_lib.text_states(self.bert, batch)


class TransM(nn.Module):
  """The network.

  Sequences need not be aligned: every part is averaged over its own steps, which for aligned ones
  is the mean over the steps of the concatenated parts.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: d, width of all steps; even, divisible by `heads`.
    heads: of the attention.
    depth: layers of each encoder and decoder.
    feedforward: their hidden width; 0 is 2d.
    dropout: everywhere.
    query: what a decoder's query side reads: the "target" sequence itself (as observed), or as
      many "learned" steps, so that the target is no input.
    targets: what translations must restore: the "complete" inputs (ours), or only what is
      "observed" of them.
    bert: for text as token ids, see `bert.setup`; its states are the text's inputs then.
  """

  num_outputs: int = 1
  size: int = 128
  heads: int = 4
  depth: int = 1
  feedforward: int = 0
  dropout: float = 0.2
  query: str = "target"
  targets: str = "complete"
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, train: bool) -> dict[str, Array]:
    """`train` adds "target_text", the states that its translations aim at, and the translations:
    "audio", "vision", "text_audio" (the text from the audio) and "text_vision"."""
    read = TextStates(self.bert.config, name="text")
    inputs = {name: masking.observed(getattr(batch, name)) for name in OTHERS}
    inputs["text"] = read(batch)
    valid = {name: getattr(batch, name).valid for name in types.MODALITIES}
    context = {name: self._context(name, inputs[name], valid[name]) for name in types.MODALITIES}
    text, parts, out = context["text"], [], {}
    for name in OTHERS:
      forward = self._transformer(f"encode_text_{name}")(text, valid["text"])
      decoded = self._decode(f"text_{name}", context[name], valid[name], forward, valid["text"])
      backward = self._transformer(f"encode_{name}_text")(decoded, valid[name])
      parts += [(forward, valid["text"]), (backward, valid[name])]
      if train:
        restored = self._decode(f"{name}_text", text, valid["text"], backward, valid[name])
        for key, states in ((name, decoded), (f"text_{name}", restored)):
          width = inputs[TRANSLATIONS[key]].shape[-1]
          out[f"translated_{key}"] = layers.Dense(width, name=f"restore_{key}")(states)
    if train:
      complete = self.targets == "complete"
      target = read(masking.complete(batch)) if complete else inputs["text"]
      out["target_text"] = jax.lax.stop_gradient(target)
    parts += [(context[name], valid[name]) for name in types.MODALITIES]
    feature = jnp.concatenate([layers.mean_over_steps(x, v) for x, v in parts], -1)  # [B, 7d]
    hidden = layers.Dropout(self.dropout)(feature)
    scores = layers.Dense(self.num_outputs, name="head")(hidden)
    return {**out, "feature": feature, "prediction": layers.prediction(scores)}

  def _context(self, name: str, x: Array, valid: Array) -> Array:
    """[B, L, d] steps of a modality that know of each other."""
    x = layers.BiGRU(self.size, 1, name=f"gru_{name}")(x, valid)
    return layers.Dropout(self.dropout)(
      jnp.tanh(layers.Dense(self.size, name=f"project_{name}")(x))
    )

  def _transformer(self, name: str) -> Transformer:
    feedforward = self.feedforward or 2 * self.size
    return Transformer(self.depth, self.heads, feedforward, self.dropout, name=name)

  def _decode(self, name, target, valid, memory, memory_valid) -> Array:
    if self.query == "learned":
      init = layers.normal(0.02)
      steps = self.param(f"queries_{name}", init, target.shape[1:])
      target = jnp.broadcast_to(steps[None], target.shape)
    return self._transformer(f"decode_{name}")(target, valid, memory, memory_valid)


def translation(out: dict[str, Array], batch: types.Batch, targets: str) -> Array:
  """Σ of the four translations' mean absolute errors over valid steps and channels.

  Args:
    out: of `TransM` in training.
    batch: the samples.
    targets: see `TransM`; with "observed", what is missing does not count.

  Returns:
    [] the sum.
  """
  total: Any = 0.0
  for key, name in TRANSLATIONS.items():
    m: types.Modality = getattr(batch, name)
    counts = m.valid[..., None]
    if targets == "observed":
      counts = counts & (m.seen if m.seen.ndim == 3 else m.seen[..., None])
    target = out["target_text"] if name == "text" else m.x
    total += losses.reconstruction(
      out[f"translated_{key}"], target, counts, error=losses.absolute_error
    )
  return total


@systems.configurable(TransM)
def make(
  network: TransM, *, translation_weight: float = 0.1, regression: str = "mse"
) -> types.System:
  """TransM as a system; the defaults are the re-implementation's.

  Args:
    network: settings of `TransM`.
    translation_weight: λ, of each of the four translations.
    regression: the task's error of a regression, "mse" or "l1".

  Returns:
    The system. Its one phase, "main", logs the parts task and translation.
  """
  for name, known in (("query", QUERIES), ("targets", TARGETS)):
    if getattr(network, name) not in known:
      raise ValueError(f"{name} is {getattr(network, name)!r}, expected one of {known}.")
  if regression not in losses.REGRESSION:
    raise ValueError(f"regression is {regression!r}, expected one of {sorted(losses.REGRESSION)}.")
  if network.size % 2 or network.size % network.heads:
    raise ValueError(
      f"size is {network.size}, but must be even and divisible by heads={network.heads}."
    )

  def loss(out, batch, extra):
    parts = {"task": losses.task(out["prediction"], batch.label, regression).mean()}
    parts["translation"] = translation(out, batch, network.targets)
    total = parts["task"] + translation_weight * parts["translation"]
    return total, types.Aux(parts, extra)

  return systems.supervised(network, loss, head="head", hessian="symmetric")
