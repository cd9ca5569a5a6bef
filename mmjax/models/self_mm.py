"""Self-MM: self-supervised unimodal labels beside the multimodal task (Yu et al. 2021).

Text is one token's BERT state (or their mean), audio and vision the last states of an LSTM.
Four heads predict, one from all three vectors (M) and one from each (T, A, V). Nobody
annotated the modalities, so the unimodal labels are generated: a modality whose features lie
nearer to the positive centre than the fusion's do gets a more positive label. The tables of
labels and features live in `extra`.

Paper: https://arxiv.org/abs/2102.04830. Parity: MMSA's implementation and its quirks.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, systems, torch_import, types

Array = types.Array
TASKS = ("fusion", "text", "audio", "vision")
EPS = 1e-8


class Head(nn.Module):
  """Returns the task's feature vector [B, H] and its scores [B, C]."""

  size: int
  dropout: float
  num_outputs: int

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    x = layers.Dropout(self.dropout)(x)
    feature = jax.nn.relu(layers.Dense(self.size, name="layer_1")(x))
    hidden = jax.nn.relu(layers.Dense(self.size, name="layer_2")(feature))
    return feature, layers.Dense(self.num_outputs, name="layer_3")(hidden)


class SelfMM(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    lstm_sizes: width of the audio and the vision LSTM.
    out_sizes: width of the audio and the vision vector.
    lstm_dropout: of the LSTMs' last states.
    head_sizes: H of the heads: fusion, text, audio, vision.
    head_dropout: of the heads' inputs.
    pooling: what stands for the text: its "first" state ([CLS], as published) or the "mean"
      of the states. With precomputed states [CLS] has read words that are missing now.
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
  """

  num_outputs: int = 1
  lstm_sizes: Sequence[int] = (16, 32)
  out_sizes: Sequence[int] = (16, 32)
  lstm_dropout: Sequence[float] = (0.0, 0.0)
  head_sizes: Sequence[int] = (128, 32, 16, 32)
  head_dropout: Sequence[float] = (0.0, 0.1, 0.1, 0.0)
  pooling: str = "first"
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    states = bert_lib.text_states(self.bert.config, batch)  # [B, L, D]
    vectors = {"text": layers.pool(states, batch.text.valid, self.pooling)}
    for n, name in enumerate(("audio", "vision")):
      m = getattr(batch, name)
      _, final = layers.LSTM(self.lstm_sizes[n], name=f"{name}_rnn")(masking.observed(m), m.valid)
      final = layers.Dropout(self.lstm_dropout[n])(final)
      vectors[name] = layers.Dense(self.out_sizes[n], name=f"{name}_out")(final)
    inputs = {"fusion": jnp.concatenate(list(vectors.values()), -1), **vectors}
    out = {"text_states": states} | {f"utt_{name}": v for name, v in vectors.items()}
    for n, task in enumerate(TASKS):
      head = Head(self.head_sizes[n], self.head_dropout[n], self.num_outputs, name=f"post_{task}")
      out[f"feature_{task}"], scores = head(inputs[task])
      out[f"prediction_{task}"] = layers.prediction(scores)
    return {**out, "prediction": out["prediction_fusion"], "feature": out["feature_fusion"]}


def centers(
  label: Array, feature: Array, met: Array, exclude_zero: bool = True
) -> tuple[Array, Array]:
  """Mean feature of the positive and of the negative samples (§3.3, eq. 7-8).

  Args:
    label: [N] labels of one task.
    feature: [N, H] its features.
    met: [N] bool, False where the sample was not met yet: it counts as neither.
    exclude_zero: whether zero labels count as neither, else as positive.

  Returns:
    Positive and negative centre, [H] each; 0 without a sample.
  """

  def mean(chosen):
    number = jnp.maximum(chosen.sum(dtype=feature.dtype), 1)
    return chosen.astype(feature.dtype) @ feature / number

  return mean(met & (label > 0 if exclude_zero else label >= 0)), mean(met & (label < 0))


def _distance(feature, centres):
  """[B] relative distance δ: positive where the positive centre is nearer."""
  to_positive, to_negative = (jnp.linalg.norm(feature - c[None], axis=-1) for c in centres)
  return (to_negative - to_positive) / (to_positive + EPS)


def update_tables(
  tables: Mapping[str, Any],
  features: Mapping[str, Array],
  index: Array,
  epoch: Array,
  *,
  bound: float,
  exclude_zero: bool = True,
) -> dict[str, Any]:
  """One step of unimodal label generation (§3.3, eq. 9-14): labels first, features after.

  The labels move from the second epoch on, with the centres as they were before the step. The
  relative distance is divided by the distance to the positive centre, as in the code.

  Args:
    tables: {"met": [N], "label": {task: [N]}, "feature": {task: [N, H]}}; the rows of this
      step are met.
    features: {task: [B, H]} of this step.
    index: [B] rows.
    epoch: [] from 0.
    bound: generated labels are clipped to ±bound.
    exclude_zero: see `centers`.

  Returns:
    The successor of `tables`.
  """
  label, feature = dict(tables["label"]), dict(tables["feature"])
  delta = {
    task: _distance(
      features[task], centers(label[task], feature[task], tables["met"], exclude_zero)
    )
    for task in TASKS
  }
  truth, n = label["fusion"][index], (epoch + 1).astype(jnp.float32)
  for task in TASKS[1:]:
    ratio = delta[task] / (delta["fusion"] + EPS)
    shifted = truth + delta[task] - delta["fusion"]
    new = jnp.clip(0.5 * ratio * truth + 0.5 * shifted, -bound, bound)
    old = label[task][index]
    moved = (n - 1) / (n + 1) * old + 2 / (n + 1) * new
    label[task] = label[task].at[index].set(jnp.where(n > 1, moved, old))
  feature = {task: feature[task].at[index].set(features[task]) for task in TASKS}
  return {**tables, "label": label, "feature": feature}


def make_tables(spec: types.Spec, sizes: Sequence[int]) -> dict[str, Any]:
  """`extra` before training, by the heads' sizes; no sample was met yet. None for classes."""
  if spec.num_classes:
    return {}
  rows = spec.num_train
  return {
    "epoch": jnp.int32(0),
    "met": jnp.zeros(rows, bool),
    "label": {task: jnp.zeros(rows) for task in TASKS},
    "feature": {task: jnp.zeros((rows, h)) for task, h in zip(TASKS, sizes, strict=True)},
  }


def multitask_loss(
  out: Mapping[str, Array],
  batch: types.Batch,
  extra: types.Extra,
  *,
  bound: float,
  exclude_zero: bool,
) -> tuple[Array, types.Aux]:
  """Σ over M, T, A, V of mean(w |prediction - label|), and the tables after the step (eq. 15).

  w is 1 for M, and tanh |label - multimodal label| for a modality. Classes have no polarity, so
  nothing can be generated: all heads learn the multimodal label by cross-entropy then.
  """
  prediction = {task: out[f"prediction_{task}"] for task in TASKS}
  names = dict(zip(TASKS, "MTAV", strict=True))
  if prediction["fusion"].ndim == 2:
    parts = {names[t]: losses.task(prediction[t], batch.label).mean() for t in TASKS}
    total: Any = sum(parts.values())
    return total, types.Aux(parts, extra)
  met = extra["met"][batch.index]
  known = {
    task: jnp.where(met, table[batch.index], batch.label) for task, table in extra["label"].items()
  }
  parts: dict[str, Any] = {}
  for task, name in names.items():
    error = losses.absolute_error(prediction[task], known[task])
    weight = jnp.tanh(jnp.abs(known[task] - known["fusion"])) if name != "M" else 1.0
    parts[name] = (weight * error).mean()
  label = {task: extra["label"][task].at[batch.index].set(known[task]) for task in TASKS}
  features = {task: jax.lax.stop_gradient(out[f"feature_{task}"]) for task in TASKS}
  successor = update_tables(
    {
      "met": extra["met"].at[batch.index].set(True),
      "label": label,
      "feature": extra["feature"],
    },
    features,
    batch.index,
    extra["epoch"],
    bound=bound,
    exclude_zero=exclude_zero,
  )
  total: Any = sum(parts.values())
  return total, types.Aux(parts, {**extra, **successor})


@systems.configurable(SelfMM)
def make(network: SelfMM, *, bound: float = 3.0, exclude_zero: bool = True) -> types.System:
  """Self-MM as a system; the defaults are MMSA's for MOSI.

  Args:
    network: settings of `SelfMM`.
    bound: largest magnitude of a generated label; the end of the dataset's scale.
    exclude_zero: whether zero labels belong to neither centre.

  Returns:
    The system. Its one phase, "main", logs the parts M, T, A and V.
  """
  layers.check_pooling(network.pooling)
  pairs, fours = ("lstm_sizes", "out_sizes", "lstm_dropout"), ("head_sizes", "head_dropout")
  for name in pairs + fours:
    value, length = getattr(network, name), 2 if name in pairs else 4
    if len(value) != length:
      raise ValueError(
        f"{name} is {value}: LSTMs need two (audio, vision), heads four (fusion, text, …)."
      )
  return systems.supervised(
    network,
    functools.partial(multitask_loss, bound=bound, exclude_zero=exclude_zero),
    head="post_fusion/layer_3",
    extra=lambda spec: make_tables(spec, network.head_sizes),
    on_epoch=systems.count_epochs,
    hessian="symmetric",
  )


TORCH_RULES = (
  *bert_lib.torch_rules(r"text_model\.model\.", "bert"),
  *torch_import.lstm_rules(r"audio_model\.rnn", "audio_rnn", bidirectional=False),
  *torch_import.lstm_rules(r"video_model\.rnn", "vision_rnn", bidirectional=False),
  (r"audio_model\.linear_1\.(weight|bias)", r"audio_out/\1"),
  (r"video_model\.linear_1\.(weight|bias)", r"vision_out/\1"),
  (r"post_video_layer_(\d)\.(weight|bias)", r"post_vision/layer_\1/\2"),
  (r"post_(fusion|text|audio)_layer_(\d)\.(weight|bias)", r"post_\1/layer_\2/\3"),
)
