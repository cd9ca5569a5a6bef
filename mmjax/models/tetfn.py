"""TETFN: the text-enhanced Transformer fusion network (Wang et al. 2023).

Audio and vision are averaged to the text's length, and crossmodal Transformers let each
modality attend to the other two; between audio and vision, text mediates. The last step of each
modality's result is fused. Four heads and generated unimodal labels are Self-MM's.

Paper: https://doi.org/10.1016/j.patcog.2022.109259. Parity: MMSA's implementation and its quirks.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from mmjax import batched, crossmodal, layers, masking, systems, torch_import, types
from mmjax import bert as bert_lib
from mmjax.models import self_mm

Array = types.Array
# Letter of a pair's target and source, in the published names of the transformers.
LETTERS = {"text": "l", "audio": "a", "vision": "v"}


def align(x: Array, length: int) -> Array:
  """[B, L, D] -> [B, length, D]: means of equally many steps; the last step fills up the end."""
  rows, steps, width = x.shape
  if steps == length:
    return x
  missing = -steps % length
  x = jnp.concatenate([x, jnp.repeat(x[:, -1:], missing, 1)], 1)
  return x.reshape(rows, length, -1, width).mean(2)


class Tetfn(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: D, width of the sequences.
    heads: of all Transformers; they divide D.
    lstm_sizes: width of the audio and the vision LSTM, which run through padding.
    kernel_sizes: of the convolution over text, and of the ones over audio and vision.
    attention_dropout: where the source is text, audio, vision.
    relu_dropout, residual_dropout, embedding_dropout: of the Transformers.
    head_sizes: H of the heads: fusion, text, audio, vision.
    head_dropout: of the heads' inputs.
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
  """

  num_outputs: int = 1
  size: int = 50
  heads: int = 5
  lstm_sizes: Sequence[int] = (16, 64)
  kernel_sizes: Sequence[int] = (1, 1)
  attention_dropout: Sequence[float] = (0.1, 0.0, 0.1)
  relu_dropout: float = 0.0
  residual_dropout: float = 0.1
  embedding_dropout: float = 0.0
  head_sizes: Sequence[int] = (64, 32, 32, 16)
  head_dropout: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    states = bert_lib.text_states(self.bert.config, batch)  # [B, L, D]
    out = {"text_states": states}
    text_width, width = self.kernel_sizes
    conv = layers.Conv1d(self.size, text_width, use_bias=False, name="text_conv")
    x = {"text": conv(states)}
    for n, name in enumerate(("audio", "vision")):
      aligned = align(masking.observed(getattr(batch, name)), states.shape[1])
      hidden, _ = layers.LSTM(self.lstm_sizes[n], name=f"{name}_rnn")(aligned)  # padding too
      conv = layers.Conv1d(self.size, width, use_bias=False, name=f"{name}_conv")
      out[f"aligned_{name}"], x[name] = aligned, conv(hidden)
    out |= {f"projected_{name}": value for name, value in x.items()}

    dropout: dict[str, float] = dict(zip(types.MODALITIES, self.attention_dropout, strict=True))
    pairs = [(t, s) for t in types.MODALITIES for s in types.MODALITIES if s != t]
    asked = [pair for pair in pairs if "text" in pair]
    found = batched.together(
      [self._transformer(f"{t}_with_{s}", 2, dropout[s]) for t, s in asked],
      [(x[t], x[s]) for t, s in asked],
    )
    out |= {f"{t}_with_{s}": value for (t, s), value in zip(asked, found, strict=True)}
    # between audio and vision: the other modality asks the text, and what it finds is asked
    mediated = [pair for pair in pairs if "text" not in pair]
    lower, upper = (
      [
        self._transformer(f"{t}_with_{s}_{part}", depth, dropout["text"], positions=True)
        for t, s in mediated
      ]
      for part, depth in (("lower", 1), ("upper", 2))
    )
    found = batched.together(lower, [(x[s], x["text"]) for _, s in mediated])
    found = batched.together(upper, [(x[t], y) for (t, _), y in zip(mediated, found, strict=True)])
    out |= {f"{t}_with_{s}": value for (t, s), value in zip(mediated, found, strict=True)}
    memory = batched.together(
      [self._transformer(f"{t}_memory", 2, dropout["text"]) for t in types.MODALITIES],
      [
        (jnp.concatenate([out[f"{t}_with_{s}"] for target, s in pairs if target == t], -1),)
        for t in types.MODALITIES
      ],
    )
    out |= {f"memory_{t}": value for t, value in zip(types.MODALITIES, memory, strict=True)}
    last = [value[:, -1] for value in memory]

    inputs = {"fusion": jnp.concatenate(last, -1)} | {name: m.max(1) for name, m in x.items()}
    for n, task in enumerate(self_mm.TASKS):
      head = self_mm.Head(
        self.head_sizes[n], self.head_dropout[n], self.num_outputs, name=f"post_{task}"
      )
      out[f"feature_{task}"], scores = head(inputs[task])
      out[f"prediction_{task}"] = layers.prediction(scores)
    return {**out, "prediction": out["prediction_fusion"], "feature": out["feature_fusion"]}

  def _transformer(self, name, depth, attention_dropout, positions=False):
    return crossmodal.CrossmodalTransformer(
      self.heads,
      depth,
      attention_dropout,
      self.relu_dropout,
      self.residual_dropout,
      self.embedding_dropout,
      positions=positions,
      name=name,
    )


@systems.configurable(Tetfn)
def make(network: Tetfn, *, bound: float = 3.0, exclude_zero: bool = True) -> types.System:
  """TETFN as a system; the defaults are MMSA's for MOSI.

  Args:
    network: settings of `Tetfn`.
    bound: largest magnitude of a generated label; the end of the dataset's scale.
    exclude_zero: whether zero labels belong to neither centre.

  Returns:
    The system. Its one phase, "main", logs the parts M, T, A and V.
  """
  size, heads = network.size, network.heads
  if size % heads:
    raise ValueError(f"size is {size}, but must be divisible by heads {heads}.")
  return systems.supervised(
    network,
    functools.partial(self_mm.multitask_loss, bound=bound, exclude_zero=exclude_zero),
    head="post_fusion/layer_3",
    extra=lambda spec: self_mm.make_tables(spec, network.head_sizes),
    on_epoch=systems.count_epochs,
    hessian="symmetric",
  )


def _transformer_rules() -> torch_import.Rules:
  rules = []
  for target, t in LETTERS.items():
    rules += crossmodal.torch_rules(f"trans_{t}_mem", f"{target}_memory")
    for source, s in LETTERS.items():
      at, to = f"trans_{t}_with_{s}", f"{target}_with_{source}"
      rules += crossmodal.torch_rules(at, to)
      for part in ("lower", "upper"):
        rules += crossmodal.torch_rules(rf"{at}\.{part}_mha", f"{to}_{part}")
  return tuple(rules)


TORCH_RULES = (
  *bert_lib.torch_rules(r"text_model\.model\.", "bert"),
  *torch_import.lstm_rules(r"audio_model\.rnn", "audio_rnn", bidirectional=False),
  *torch_import.lstm_rules(r"video_model\.rnn", "vision_rnn", bidirectional=False),
  (r"audio_model\.conv\.weight", "audio_conv/weight"),
  (r"video_model\.conv\.weight", "vision_conv/weight"),
  (r"proj_l\.weight", "text_conv/weight"),
  *_transformer_rules(),
  (r"post_video_layer_(\d)\.(weight|bias)", r"post_vision/layer_\1/\2"),
  (r"post_(fusion|text|audio)_layer_(\d)\.(weight|bias)", r"post_\1/layer_\2/\3"),
)
