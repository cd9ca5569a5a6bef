"""TFR-Net: the Transformer-based feature reconstruction network (Yuan et al. 2021).

Crossmodal Transformers let each modality attend to itself and to the other two; gated GRUs
condense the results for the prediction. In training, generators restore what was missing, and
only that is compared with the complete data.

Paper: https://dl.acm.org/doi/10.1145/3474085.3475585. Parity: MMSA's code and its quirks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmjax import batched, crossmodal, layers, losses, masking, systems, torch_import, types
from mmjax import bert as bert_lib

Array = types.Array
LETTERS = {"text": "l", "audio": "a", "vision": "v"}
EPS = 1e-4


class Gate(nn.Module):
  """[B, L, D] -> [B, H]: a gated bidirectional GRU beside the input, max over time."""

  size: int
  depth: int
  dropout: float

  @nn.compact
  def __call__(self, x: Array, valid: Array) -> Array:
    states = layers.BiGRU(self.size, self.depth, name="gru")(x, valid)
    gate = jax.nn.sigmoid(layers.Conv1d(1, 3, padding=1, name="gate")(states))
    hidden = jnp.concatenate([x, jnp.tanh(states) * gate], -1)
    hidden = jnp.tanh(layers.Dense(self.size, name="out")(hidden))
    return layers.Dropout(self.dropout)(hidden.max(1))  # over padding too, as published


class TextStates(nn.Module):
  """[B, L, D] states of the observed text; twice with the same weights in training."""

  config: bert_lib.BertConfig

  @nn.compact
  def __call__(self, batch: types.Batch) -> Array:
    return bert_lib.text_states(self.config, batch)


class TfrNet(nn.Module):
  """The network. Threes are of text, audio, vision.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: D, width of the projected sequences.
    heads: of the crossmodal Transformers; they divide D.
    depth: their layers.
    memory_depth: layers of the intramodal Transformers and of those before the generators.
    temporal_heads: largest number of heads of the Transformers before the generators; it is
      lowered to a divisor of the modality's steps, which are their channels.
    kernel_sizes: odd widths of the projecting convolutions.
    gate_sizes: H of the gated GRUs; `gate_depth` their layers.
    hidden_size: of the head.
    text_dropout, attention_dropout, transformer_dropout, gate_dropout, head_dropout: rates.
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
  """

  num_outputs: int = 1
  size: int = 30
  heads: int = 6
  depth: int = 3
  memory_depth: int = 3
  temporal_heads: int = 25
  kernel_sizes: Sequence[int] = (1, 5, 3)
  gate_sizes: Sequence[int] = (36, 20, 48)
  gate_depth: int = 3
  hidden_size: int = 128
  text_dropout: float = 0.2
  attention_dropout: Sequence[float] = (0.2, 0.1, 0.0)
  transformer_dropout: float = 0.2
  gate_dropout: float = 0.2
  head_dropout: float = 0.0
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(
    self, batch: types.Batch, train: bool, *, generate: bool | None = None
  ) -> dict[str, Array]:
    """Runs.

    Args:
      batch: the batch.
      train: whether the head's BatchNorm uses the batch's statistics.
      generate: whether the missing features are restored, and the complete text encoded; by
        default in training.
    """
    generate = train if generate is None else generate
    encode = TextStates(self.bert.config, name="text")
    states = encode(batch)
    inputs = {
      "text": layers.Dropout(self.text_dropout)(states),
      "audio": masking.observed(batch.audio),
      "vision": masking.observed(batch.vision),
    }
    out, x = {"text_states": states}, {}
    for n, name in enumerate(types.MODALITIES):
      width = self.kernel_sizes[n]
      project = layers.Conv1d(
        self.size, width, use_bias=False, padding=(width - 1) // 2, name=f"project_{name}"
      )
      x[name] = project(inputs[name])
      out[f"projected_{name}"] = x[name]

    dropout: dict[str, float] = dict(zip(types.MODALITIES, self.attention_dropout, strict=True))
    memory = batched.together(
      [
        self._transformer(f"{name}_memory", self.heads, self.memory_depth, dropout["text"])
        for name in types.MODALITIES
      ],
      [(x[name],) for name in types.MODALITIES],
    )
    pairs = [(t, s) for t in types.MODALITIES for s in types.MODALITIES if s != t]
    found = batched.together(
      [self._transformer(f"{t}_with_{s}", self.heads, self.depth, dropout[s]) for t, s in pairs],
      [(x[t], x[s]) for t, s in pairs],
    )
    out |= {f"{t}_with_{s}": value for (t, s), value in zip(pairs, found, strict=True)}
    vectors, towers, channels = [], [], []
    for n, name in enumerate(types.MODALITIES):
      parts = [out[f"{t}_with_{s}"] for t, s in pairs if t == name]
      out[f"memory_{name}"], h = memory[n], jnp.concatenate([memory[n], *parts], -1)
      out[f"joint_{name}"] = h
      gate = Gate(self.gate_sizes[n], self.gate_depth, self.gate_dropout, name=f"gate_{name}")
      vectors.append(gate(h, getattr(batch, name).valid))
      out[f"utt_{name}"] = vectors[-1]
      steps = h.shape[1]
      heads = max(k for k in range(1, self.temporal_heads + 1) if steps % k == 0)
      towers.append(
        self._transformer(
          f"{name}_final", heads, self.memory_depth, dropout["text"], positions=False
        )
      )
      # as published: features are the batch, samples the steps, and steps the channels
      channels.append((h.transpose(2, 0, 1),))
    if generate:
      for name, final in zip(types.MODALITIES, batched.together(towers, channels), strict=True):
        final = final.transpose(1, 2, 0)
        clean = encode(masking.complete(batch)) if name == "text" else getattr(batch, name).x
        restore = layers.Dense(clean.shape[-1], name=f"generate_{name}")
        out |= {f"final_{name}": final, f"generated_{name}": restore(final)}
        out[f"complete_{name}"] = clean

    out["feature"] = jnp.concatenate(vectors, -1)
    hidden = layers.BatchNorm(name="head_norm")(out["feature"], train)
    hidden = jax.nn.leaky_relu(layers.Dense(self.hidden_size, name="head_1")(hidden))
    hidden = layers.Dropout(self.head_dropout)(hidden)
    scores = layers.Dense(self.num_outputs, name="head_2")(hidden)
    out["prediction"] = layers.prediction(scores)
    return out

  def _transformer(self, name, heads, depth, attention_dropout, positions=True):
    rate = self.transformer_dropout
    return crossmodal.CrossmodalTransformer(
      heads, depth, attention_dropout, rate, rate, rate, positions=positions, name=name
    )


def generation_loss(
  generated: Array, target: Array, m: types.Modality, similarity_weight: float
) -> Array:
  """Error of what was missing: smooth L1 and CMD of three moments, each over the entries (§3.3).

  Args:
    generated, target: [B, L, D].
    m: its `seen` and `valid` say what was missing.
    similarity_weight: of CMD.

  Returns:
    [] the loss.
  """
  seen = m.seen if m.seen.ndim == 2 else m.seen.all(-1)
  missing = (m.valid & ~seen)[:, :, None]
  count = missing.sum(dtype=generated.dtype) * generated.shape[-1] + EPS
  generated, target = (jnp.where(missing, a, 0) for a in (generated, target))
  flat = (z.reshape(-1, z.shape[-1]) for z in (generated, target))
  similar = losses.cmd(*flat, moments=3)
  error = optax.losses.huber_loss(generated, target).sum()
  return (error + similarity_weight * similar) / count


def loss_parts(
  out: Mapping[str, Array],
  batch: types.Batch,
  weights: Sequence[float],
  similarity_weight: float,
) -> dict[str, Array]:
  """ "pred", "gen_text", "gen_audio", "gen_vision" and their weighted sum "gen"."""
  parts = {"pred": losses.task(out["prediction"], batch.label, "l1").mean()}
  for name in types.MODALITIES:
    parts[f"gen_{name}"] = generation_loss(
      out[f"generated_{name}"], out[f"complete_{name}"], getattr(batch, name), similarity_weight
    )
  named = zip(weights, types.MODALITIES, strict=True)
  total: Any = sum(weight * parts[f"gen_{name}"] for weight, name in named)
  return {**parts, "gen": total}


@systems.configurable(TfrNet)
def make(
  network: TfrNet,
  *,
  generation_weights: Sequence[float] = (5.0, 2.0, 20.0),
  similarity_weight: float = 5.0,
) -> types.System:
  """TFR-Net as a system; the defaults are MMSA's for MOSI.

  Args:
    network: settings of `TfrNet`.
    generation_weights: of the generation losses of text, audio, vision.
    similarity_weight: of CMD inside of them.

  Returns:
    The system. Its one phase, "main", logs pred, gen and gen's parts; gen enters in the second
    epoch.
  """
  size, heads = network.size, network.heads
  if size % heads:
    raise ValueError(f"size is {size}, but must be divisible by heads {heads}.")

  def loss(out, batch, extra):
    parts = loss_parts(out, batch, generation_weights, similarity_weight)
    total = parts["pred"] + jnp.where(extra["epoch"] > 0, parts["gen"], 0.0)
    return total, types.Aux(parts, extra)

  return systems.supervised(
    network,
    loss,
    head="head_2",
    collections=("batch_stats",),
    extra=lambda spec: {"epoch": jnp.int32(0)},
    on_epoch=systems.count_epochs,
    hessian="symmetric",
  )


def _rules() -> torch_import.Rules:
  align, fuse, rules = r"align_subnet\.Model\.", r"fusion_subnet\.Model\.", []
  for name, letter in LETTERS.items():
    rules.append((rf"{align}proj_{letter}\.weight", f"project_{name}/weight"))
    for part, ours in (("mem", "memory"), ("final", "final")):
      rules += crossmodal.torch_rules(rf"{align}trans_{letter}_{part}", f"{name}_{ours}")
    for source, other in LETTERS.items():
      at = rf"{align}trans_{letter}_with_{other}"
      rules += crossmodal.torch_rules(at, f"{name}_with_{source}")
    at = rf"{fuse}{name}_encoder\."
    rules += torch_import.gru_rules(rf"{at}gru\.gru", f"gate_{name}/gru")
    rules += [
      (rf"{at}cnn\.(weight|bias)", rf"gate_{name}/gate/\1"),
      (rf"{at}fc\.(weight|bias)", rf"gate_{name}/out/\1"),
      (rf"generator_{name[0]}\.Model\.linear\.(weight|bias)", rf"generate_{name}/\1"),
    ]
  return tuple(rules)


TORCH_RULES = (
  *bert_lib.torch_rules(r"text_model\.model\.", "text/bert"),
  *_rules(),
  (r"fusion_subnet\.Model\.classifier\.linear_trans_norm\.(weight|bias)", r"head_norm/\1"),
  (r"fusion_subnet\.Model\.classifier\.linear_trans_norm\.num_batches_tracked", None),
  (r"fusion_subnet\.Model\.classifier\.linear_trans_hidden\.(weight|bias)", r"head_1/\1"),
  (r"fusion_subnet\.Model\.classifier\.linear_trans_final\.(weight|bias)", r"head_2/\1"),
)
