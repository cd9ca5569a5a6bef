"""CorrKD, a re-implementation from descriptions (Li et al. 2024, CVPR).

A teacher learns from complete data, then a student of the same structure from what is observed,
with three ties to the frozen teacher beside the task: its joint representations are near the
teacher's of the same sample and away from those of other samples (SCD), they are as similar to the
classes' prototypes as the teacher's are (CPD), and the responses to the true class and to all
others share as much information as possible with the teacher's (RCD).

Paper: https://arxiv.org/abs/2404.16456. Neither its code nor its full text was at hand: the
losses were written after public descriptions of it, and their formulas are to be checked against
the paper. Results of this system are not CorrKD's. "ours" says that a choice has no source.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import distill, layers, losses, masking, systems, types

Array = types.Array
RESPONSES = ("information", "kl")


class CorrKd(nn.Module):
  """The network, of the teacher and of the student alike.

  Sizes other than `size` and `heads` are ours.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: d, width of a modality's steps; even, divisible by `heads`.
    heads: of the attention.
    depth: Transformer layers of each modality.
    feedforward: their hidden width; 0 is 4d.
    dropout: of the Transformers.
    norm: "pre" or "post": where the Transformers normalize.
    bert: for text as token ids, see `bert.setup`; teacher and student have one each.
  """

  num_outputs: int = 1
  size: int = 40
  heads: int = 10
  depth: int = 2
  feedforward: int = 0
  dropout: float = 0.1
  norm: str = "pre"
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    """ "feature" is H [B, 3d], the modalities' means over their steps."""
    pooled = []
    for name in types.MODALITIES:
      m: types.Modality = getattr(batch, name)
      x = bert_lib.text_states(self.bert.config, batch) if name == "text" else masking.observed(m)
      encode = distill.SequenceEncoder(
        self.size,
        self.heads,
        self.depth,
        self.feedforward or 4 * self.size,
        self.dropout,
        self.norm,
        name=name,
      )
      pooled.append(layers.mean_over_steps(encode(x, m.valid), m.valid))
    feature = jnp.concatenate(pooled, -1)
    scores = layers.Dense(self.num_outputs, name="head")(feature)
    return {"feature": feature, "prediction": layers.prediction(scores)}


def classes(prediction: Array, label: Array) -> tuple[Array, Array]:
  """Logits [B, C] and classes [B] of a task.

  A regression has two: negative, and the others. Its value stands for the logit of the latter
  (ours).

  Args:
    prediction: logits [B, C], or values [B].
    label: classes [B], or values [B].

  Returns:
    The logits and the classes, int32.
  """
  if prediction.ndim == 2:
    return prediction, label.astype(jnp.int32)
  return jnp.stack([jnp.zeros_like(prediction), prediction], -1), (label >= 0).astype(jnp.int32)


def contrast(teacher: Array, student: Array, margin: float, normalize: bool = False) -> Array:
  """SCD: D(s_i, t_i)² + max(0, margin - D(s_i, t_j))², the mean over all pairs i != j (ours).

  Args:
    teacher, student: [B, D].
    margin: η, beyond which other samples' representations do not matter.
    normalize: whether representations have length 1.

  Returns:
    [] the mean.
  """
  if normalize:
    teacher, student = (
      x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-8) for x in (teacher, student)
    )
  squared = ((student[:, None] - teacher[None]) ** 2).sum(-1)  # [B, B]
  rows = len(student)
  other = ~jnp.eye(rows, dtype=bool)
  pushed = jnp.maximum(margin - jnp.sqrt(squared + 1e-8), 0) ** 2
  return jnp.trace(squared) / rows + losses.masked_mean(pushed, other)


def similarity(x: Array, label: Array, count: int) -> tuple[Array, Array]:
  """Cosines [B, C] of samples x [B, D] and the classes' means, and which classes there are [C]."""
  member = jax.nn.one_hot(label, count, dtype=x.dtype)
  number = member.sum(0)
  means = member.T @ x / jnp.maximum(number, 1)[:, None]
  x, means = (a / jnp.sqrt((a**2).sum(-1, keepdims=True) + 1e-8) for a in (x, means))
  return x @ means.T, number > 0


def prototypes(teacher: Array, student: Array, label: Array, count: int) -> Array:
  """CPD: the mean difference of both networks' similarities to the batch's class means.

  Args:
    teacher, student: [B, D].
    label: [B] classes.
    count: C; a class that the batch has not counts nothing (ours).

  Returns:
    [] the mean over the samples and the classes that there are.
  """
  (ours, there), (theirs, _) = (similarity(x, label, count) for x in (student, teacher))
  return losses.masked_mean(jnp.abs(ours - theirs), there[None])


def responses(logits: Array, label: Array) -> tuple[Array, Array]:
  """Probabilities of the true class [B, 1], and of the others among themselves [B, C - 1]."""
  target = jnp.take_along_axis(jax.nn.softmax(logits), label[:, None], 1)
  others = jnp.arange(logits.shape[1] - 1)[None]
  others = others + (others >= label[:, None]).astype(others.dtype)
  return target, jax.nn.softmax(jnp.take_along_axis(logits, others, 1))


@systems.configurable(CorrKd)
def make(
  network: CorrKd,
  *,
  task_weight: float = 1.0,
  scd_weight: float = 1.0,
  cpd_weight: float = 1.0,
  rcd_weight: float = 1.0,
  margin: float = 1.2,
  normalize: bool = False,
  response: str = "information",
  statistics_size: int = 40,
  negatives: str = "all",
  teacher_epochs: int = 50,
) -> types.System:
  """CorrKD (re-implementation from descriptions) as a system; the defaults are for MOSI.

  The teacher of the second phase is that of the first one's last epoch, frozen and without dropout;
  it reads complete data whatever the method. Parts of weight 0 are not computed.

  Args:
    network: settings of `CorrKd`, for teacher and student.
    task_weight, scd_weight, cpd_weight, rcd_weight: of the loss parts; no source has weights.
    margin, normalize: of `contrast`; with normalize a margin of 1 is meant.
    response: RCD as mutual "information", or the ablation's "kl" of the outputs.
    statistics_size: hidden width of the bounds' statistics networks (ours).
    negatives: see `distill.information`.
    teacher_epochs: epochs of phase "teacher", before the student's begin.

  Returns:
    The system. Phase "student" logs the parts task, scd, cpd and rcd.
  """
  chosen = (
    ("norm", network.norm, distill.NORMS),
    ("response", response, RESPONSES),
    ("negatives", negatives, distill.NEGATIVES),
  )
  for name, value, known in chosen:
    if value not in known:
      raise ValueError(f"{name} is {value!r}, expected one of {known}.")
  if network.size % 2 or network.size % network.heads:
    raise ValueError(
      f"size is {network.size}, but must be even and divisible by heads={network.heads}."
    )
  model = systems.functional(network, head="head")
  statistics = distill.Statistics(statistics_size)

  def init(key, spec):
    keys = jax.random.split(key, 3)
    # of two classes the other one's share is always 1: nothing to know
    widths = [1] if spec.num_classes <= 2 else [1, spec.num_classes - 1]
    critics = distill.init_critics(keys[2], lambda width: statistics, widths, 2)
    teacher, student = (model.init(key, spec)[0] for key in keys[:2])
    return {"teacher": teacher, "student": student, "statistics": critics}, {}

  def predict(params, batch, extra):
    return model.predict(params["student"], batch, extra)

  def task(out, batch):
    return losses.task(out["prediction"], batch.label).mean()

  def teacher_loss(params, batch, key, extra):
    out, _ = model.apply(params["teacher"], masking.complete(batch), {}, key)
    return task_weight * task(out, batch), types.Aux({"task": task(out, batch)}, extra)

  def of_responses(critics: Mapping, theirs: Array, ours: Array, label: Array) -> Array:
    if response == "kl":
      return distill.divergence(theirs, ours)
    pairs = zip(responses(theirs, label), responses(ours, label), strict=True)
    bounds = [
      distill.information(distill.bind(statistics, critic), x[None], y[None], negatives)
      for critic, (x, y) in zip(critics.values(), pairs, strict=False)
    ]
    return -jnp.stack(bounds).sum()

  def student_loss(params, batch, key, extra):
    out, _ = model.apply(params["student"], batch, {}, key)
    target = model.predict(params["teacher"], masking.complete(batch), {})
    target = jax.lax.stop_gradient(target)
    logits, label = classes(out["prediction"], batch.label)
    theirs, _ = classes(target["prediction"], batch.label)
    features = (target["feature"], out["feature"])
    parts = {"task": task(out, batch)}
    if scd_weight:
      parts["scd"] = contrast(*features, margin, normalize)
    if cpd_weight:
      parts["cpd"] = prototypes(*features, label, logits.shape[1])
    if rcd_weight:
      parts["rcd"] = of_responses(params["statistics"], theirs, logits, label)
    weights = {"task": task_weight, "scd": scd_weight, "cpd": cpd_weight, "rcd": rcd_weight}
    total: Any = sum(weights[name] * part for name, part in parts.items())
    return total, types.Aux(parts, extra)

  phases = (
    types.Phase(
      "teacher", teacher_loss, "^teacher/", epochs=(0, teacher_epochs), hessian="symmetric"
    ),
    types.Phase(
      "student",
      student_loss,
      "^(student|statistics)/",
      epochs=(teacher_epochs, None),
      hessian="symmetric",
    ),
  )
  return types.System(init, predict, phases)
