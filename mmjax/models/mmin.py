"""MMIN: the missing modality imagination network (Zhao et al. 2021).

Phase "teacher" trains an encoder per modality on complete data. Phase "student" starts from
copies of them, reads what is observed, and imagines what is missing: a cascade of residual
autoencoders maps the observed embeddings to those that the frozen teacher finds in the
complement, the part of the data that the student does not see; a second cascade maps back
(cycle). The student predicts from the first cascade's latents.

Paper: https://aclanthology.org/2021.acl-long.203. Parity: the authors' code and its quirks.
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
ORDER = ("audio", "text", "vision")  # of the concatenated embeddings
FILTERS, WIDTHS = 128, (3, 4, 5)  # of the text CNN
POOLINGS = ("maxpool", "last", "attention")


def kaiming(key, shape, dtype=jnp.float32):
  """N(0, 2 / in) of [..., out], "in" being all axes but the last."""
  return layers.normal(math.sqrt(2 / math.prod(shape[:-1])))(key, shape, dtype)


def dense(size: int | tuple[int, int], name: str) -> nn.Dense | layers.Dense:
  if not isinstance(size, int):  # the head of binary problems, which the authors have not
    return layers.Dense(size, name=name)
  return nn.Dense(size, kernel_init=kaiming, name=name)


class SequenceEncoder(nn.Module):
  """[B, L, D] -> [B, E]. Runs through padding, which the pooling sees too, as in the code.

  The published attention normalizes over an axis of length 1, so all its weights are 1:
  "attention" is the sum over the steps.
  """

  size: int
  pooling: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    states, final = layers.LSTM(self.size, name="rnn")(x)
    if self.pooling == "last":
      return final
    return states.max(1) if self.pooling == "maxpool" else states.sum(1)


class TextCNN(nn.Module):
  """[B, L, D] -> [B, E]: convolutions over 3, 4 and 5 steps, max over time."""

  size: int
  dropout: float = 0.5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if x.shape[1] < max(WIDTHS):
      raise ValueError(f"MMIN's text CNN needs {max(WIDTHS)} steps, the text has {x.shape[1]}.")
    pooled = []
    for n, width in enumerate(WIDTHS, 1):
      conv = layers.Conv1d(FILTERS, width, kernel_init=kaiming, name=f"conv_{n}")
      pooled.append(jax.nn.relu(conv(x)).max(1))
    hidden = layers.Dropout(self.dropout)(jnp.concatenate(pooled, -1))
    return jax.nn.relu(dense(self.size, "out")(hidden))


class Encoders(nn.Module):
  """{modality: [B, E]} of what is observed; `sizes` are those of audio, text and vision."""

  sizes: Sequence[int]
  pooling: str
  bert: bert_lib.Setup

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    audio, text, vision = self.sizes
    return {
      "audio": SequenceEncoder(audio, self.pooling, name="audio")(masking.observed(batch.audio)),
      "text": TextCNN(text, name="text")(bert_lib.text_states(self.bert.config, batch)),
      "vision": SequenceEncoder(vision, self.pooling, name="vision")(
        masking.observed(batch.vision)
      ),
    }


class ResidualAutoencoder(nn.Module):
  """A cascade of autoencoders; each reads the sum of the input and all outputs before it."""

  sizes: Sequence[int]
  blocks: int

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    """[B, D] -> reconstruction [B, D] and the blocks' latents [B, blocks · sizes[-1]]."""
    width, latents, y = x.shape[-1], [], 0.0
    for block in range(self.blocks):
      x = x + y
      z = self._layers(x, self.sizes, jax.nn.leaky_relu, f"encoder_{block}")
      latents.append(z)
      y = self._layers(z, (*self.sizes[-2::-1], width), jax.nn.relu, f"decoder_{block}")
    out = self._layers(x + y, (width, width), jax.nn.relu, "transition")
    return out, jnp.concatenate(latents, -1)

  def _layers(self, x, sizes, activation, name):
    """Dense layers; no activation after the last."""
    for n, size in enumerate(sizes):
      x = dense(size, f"{name}_{n}")(x if n == 0 else activation(x))
    return x


class Classifier(nn.Module):
  """[B, D] -> scores [B, C]; `train` normalizes by the batch where batch_norm is on."""

  sizes: Sequence[int]
  num_outputs: int
  dropout: float
  batch_norm: bool

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    for n, size in enumerate(self.sizes):
      x = jax.nn.relu(dense(size, f"layer_{n}")(x))
      if self.batch_norm:
        x = layers.BatchNorm(name=f"norm_{n}")(x, train)
      x = layers.Dropout(self.dropout)(x)
    return dense(self.num_outputs, "out")(x)


def concatenate(embeddings: Mapping[str, Array]) -> Array:
  """[B, ΣE] in the published order."""
  return jnp.concatenate([embeddings[name] for name in ORDER], -1)


class Teacher(nn.Module):
  """Embeddings of complete data and a classifier on them; the attributes are the student's."""

  num_outputs: int
  embedding_sizes: Sequence[int]
  pooling: str
  classifier_sizes: Sequence[int]
  dropout: float
  bert: bert_lib.Setup

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    encode = Encoders(self.embedding_sizes, self.pooling, self.bert, name="encoders")
    embedding = concatenate(encode(batch))
    classify = Classifier(
      self.classifier_sizes, self.num_outputs, self.dropout, batch_norm=False, name="classifier"
    )
    prediction = layers.prediction(classify(embedding))
    return {"embedding": embedding, "feature": embedding, "prediction": prediction}


class Student(nn.Module):
  """Encoders of what is observed, imagination forth and back, and a classifier.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    embedding_sizes: E of audio, text and vision.
    pooling: of audio and vision over time: "maxpool", "last" or "attention" (the sum).
    autoencoder_sizes: widths of an autoencoder's encoder; the last is the latent's.
    blocks: autoencoders in a cascade.
    classifier_sizes: hidden widths of the classifiers.
    dropout: of the classifiers.
    batch_norm: whether the student's classifier normalizes; its statistics are in `extra`.
    share_weight: whether the cycle's cascade is the imagination's.
    bert: for text as token ids, see `bert.setup`; teacher and student have one each.
  """

  num_outputs: int = 1
  embedding_sizes: Sequence[int] = (128, 128, 128)
  pooling: str = "maxpool"
  autoencoder_sizes: Sequence[int] = (256, 128, 64)
  blocks: int = 5
  classifier_sizes: Sequence[int] = (128, 128)
  dropout: float = 0.5
  batch_norm: bool = False
  share_weight: bool = False
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, train: bool) -> dict[str, Array]:
    parts = Encoders(self.embedding_sizes, self.pooling, self.bert, name="encoders")(batch)
    embedding = concatenate(parts)
    imagine = cycle = ResidualAutoencoder(self.autoencoder_sizes, self.blocks, name="imagine")
    if not self.share_weight:
      cycle = ResidualAutoencoder(self.autoencoder_sizes, self.blocks, name="cycle")
    imagined, latent = imagine(embedding)
    restored, latent_cycle = cycle(imagined)
    classify = Classifier(
      self.classifier_sizes, self.num_outputs, self.dropout, self.batch_norm, name="classifier"
    )
    return {
      **{f"utt_{name}": part for name, part in parts.items()},
      "embedding": embedding,
      "imagined": imagined,
      "latent": latent,
      "feature": latent,
      "restored": restored,
      "latent_cycle": latent_cycle,
      "prediction": layers.prediction(classify(latent, train)),
    }


@systems.configurable(Student)
def make(
  network: Student,
  *,
  task_weight: float = 1.0,
  imagination_weight: float = 4.0,
  cycle_weight: float = 2.0,
  teacher_epochs: int = 20,
) -> types.System:
  """MMIN as a system; the defaults are the authors' for IEMOCAP.

  Regression, which the authors do not have, is trained by the squared error.

  Args:
    network: settings of `Student`, which the teacher shares.
    task_weight, imagination_weight, cycle_weight: of the loss parts.
    teacher_epochs: epochs of phase "teacher", before the student's begin.

  Returns:
    The system. Phase "student" logs the parts ce (the task's), mse and cycle.
  """
  if network.pooling not in POOLINGS:
    raise ValueError(f"pooling is {network.pooling!r}, expected one of {POOLINGS}.")
  collections = ("batch_stats",) if network.batch_norm else ()
  student = systems.functional(network, head="classifier/out", collections=collections)
  shared = {name: getattr(network, name) for name in systems.settings_of(Teacher)}
  teacher = systems.functional(Teacher(num_outputs=1, **shared), head="classifier/out")

  def init(key, spec):
    one, other = jax.random.split(key)
    params, extra = student.init(other, spec)
    return {"teacher": teacher.init(one, spec)[0], "student": params}, extra

  def predict(params, batch, extra):
    return student.predict(params["student"], batch, extra)

  def task(out, batch):
    return losses.task(out["prediction"], batch.label).mean()

  def teacher_loss(params, batch, key, extra):
    out, _ = teacher.apply(params["teacher"], masking.complete(batch), {}, key)
    return task(out, batch), types.Aux({}, extra)

  def student_loss(params, batch, key, extra):
    out, extra = student.apply(params["student"], batch, extra, key, train=True)
    frozen = jax.lax.stop_gradient(params["teacher"])
    target = teacher.predict(frozen, masking.complement(batch), {})["embedding"]
    parts = {
      "ce": task(out, batch),
      "mse": losses.reconstruction(out["imagined"], target),
      # the target alone is detached: the gradient runs through both cascades
      "cycle": losses.reconstruction(out["restored"], jax.lax.stop_gradient(out["embedding"])),
    }
    weights = {"ce": task_weight, "mse": imagination_weight, "cycle": cycle_weight}
    total: Any = sum(weights[name] * part for name, part in parts.items())
    return total, types.Aux(parts, extra)

  def on_epoch(params, extra, epoch, train):  # the student begins as its teacher
    del train
    if epoch != teacher_epochs:
      return params, extra
    copy = jax.tree.map(jnp.copy, params["teacher"]["encoders"])
    return {**params, "student": {**params["student"], "encoders": copy}}, extra

  phases = (
    types.Phase(
      "teacher", teacher_loss, "^teacher/", epochs=(0, teacher_epochs), hessian="symmetric"
    ),
    types.Phase(
      "student",
      student_loss,
      "^student/",
      epochs=(teacher_epochs, None),
      on_epoch=on_epoch,
      hessian="symmetric",
    ),
  )
  return types.System(init, predict, phases)


def torch_rules(settings: Mapping[str, Any]) -> torch_import.Rules:
  """Rules for the state_dicts of all networks, "A.…", "pretrained.A.…" and so on."""
  # of PyTorch's classifier, for its numbering
  layers_per_block = 2 + settings["batch_norm"] + (settings["dropout"] > 0)
  rules = []
  names = (("audio", "A"), ("vision", "V"), ("text", "L"))
  for prefix, who in (("", "student"), (r"pretrained\.", "teacher")):
    for name, letter in names:
      at, to = rf"{prefix}{letter}\.", f"{who}/encoders/{name}"
      rules += torch_import.lstm_rules(rf"{at}rnn", f"{to}/rnn", bidirectional=False)
      rules += [
        (rf"{at}conv(\d)\.(weight|bias)", rf"{to}/conv_\1/\2"),
        (rf"{at}embd\.0\.(weight|bias)", f"{to}/out/" + r"\1"),
        (rf"{at}attention.*", None),  # its weights are all 1, whatever it holds
      ]
    rules += bert_lib.torch_rules(rf"{prefix}bert\.", f"{who}/encoders/bert")
    for n in range(len(settings["classifier_sizes"])):
      at = rf"{prefix}C\.module\.{n * layers_per_block}\."
      rules.append((at + "(weight|bias)", rf"{who}/classifier/layer_{n}/\1"))
      at = rf"{prefix}C\.module\.{n * layers_per_block + 2}\."
      rules.append((at + "(weight|bias)", rf"{who}/classifier/norm_{n}/\1"))
    rules.append((rf"{prefix}C\.fc_out\.(weight|bias)", rf"{who}/classifier/out/\1"))
  for cascade, name in (("AE", "imagine"), ("AE_cycle", "cycle")):
    for n in range(9):  # every other module of PyTorch's is an activation
      at = rf"{cascade}\.(encoder_\d|decoder_\d|transition)\.{2 * n}\."
      rules.append((at + "(weight|bias)", rf"student/{name}/\1_{n}/\2"))
  return tuple(rules)
