"""MMIN: the missing modality imagination network (Zhao et al. 2021).

Phase "teacher" trains an encoder per modality on complete data. Phase "student" starts from
copies of them, reads what is observed, and imagines what is missing: a cascade of residual
autoencoders maps the observed embeddings to those that the frozen teacher finds in the
complement, the part of the data that the student does not see; a second cascade maps back
(cycle). The student predicts from the first cascade's latents.

Paper: https://aclanthology.org/2021.acl-long.203. Parity: the authors' code and its quirks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, torch_import, types

Array = types.Array
ORDER = ("audio", "text", "vision")  # of the concatenated embeddings
FILTERS, WIDTHS = 128, (3, 4, 5)  # of the text CNN
POOLINGS = ("maxpool", "last", "attention")
KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def dense(size: int, name: str) -> nn.Dense:
  return nn.Dense(size, kernel_init=KAIMING, name=name)


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
      conv = layers.Conv1d(FILTERS, width, kernel_init=KAIMING, name=f"conv_{n}")
      pooled.append(jax.nn.relu(conv(x)).max(1))
    hidden = layers.Dropout(self.dropout)(jnp.concatenate(pooled, -1))
    return jax.nn.relu(dense(self.size, "out")(hidden))


class Encoders(nn.Module):
  """{modality: [B, E]} of what is observed; `sizes` are those of audio, text and vision."""

  sizes: Sequence[int]
  pooling: str
  bert: bert_lib.BertConfig

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    audio, text, vision = self.sizes
    return {
      "audio": SequenceEncoder(audio, self.pooling, name="audio")(masking.observed(batch.audio)),
      "text": TextCNN(text, name="text")(bert_lib.text_states(self.bert, batch)),
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
  """Embeddings of complete data and a classifier on them."""

  encoders: Encoders
  classifier: Classifier

  def __call__(self, batch: types.Batch, train: bool = False) -> dict[str, Array]:
    embedding = concatenate(self.encoders(batch))
    scores = self.classifier(embedding, train)
    return {"embedding": embedding, "feature": embedding, "scores": scores}


class Student(nn.Module):
  """Encoders of what is observed, imagination forth and back, and a classifier."""

  encoders: Encoders
  imagine: ResidualAutoencoder
  cycle: ResidualAutoencoder | None
  classifier: Classifier

  def __call__(self, batch: types.Batch, train: bool = False) -> dict[str, Array]:
    parts = self.encoders(batch)
    embedding = concatenate(parts)
    imagined, latent = self.imagine(embedding)
    restored, latent_cycle = (self.cycle or self.imagine)(imagined)
    return {
      **{f"utt_{name}": part for name, part in parts.items()},
      "embedding": embedding,
      "imagined": imagined,
      "latent": latent,
      "feature": latent,
      "restored": restored,
      "latent_cycle": latent_cycle,
      "scores": self.classifier(latent, train),
    }


def make(
  *,
  embedding_sizes: Sequence[int] = (128, 128, 128),
  pooling: str = "maxpool",
  autoencoder_sizes: Sequence[int] = (256, 128, 64),
  blocks: int = 5,
  classifier_sizes: Sequence[int] = (128, 128),
  dropout: float = 0.5,
  batch_norm: bool = False,
  share_weight: bool = False,
  task_weight: float = 1.0,
  imagination_weight: float = 4.0,
  cycle_weight: float = 2.0,
  teacher_epochs: int = 20,
  bert: Mapping[str, Any] | None = None,
) -> types.System:
  """MMIN as a system; the defaults are the authors' for IEMOCAP.

  Regression, which the authors do not have, is trained by the squared error.

  Args:
    embedding_sizes: E of audio, text and vision.
    pooling: of audio and vision over time: "maxpool", "last" or "attention" (the sum).
    autoencoder_sizes: widths of an autoencoder's encoder; the last is the latent's.
    blocks: autoencoders in a cascade.
    classifier_sizes: hidden widths of the classifiers.
    dropout: of the classifiers.
    batch_norm: whether the student's classifier normalizes; its statistics are in `extra`.
    share_weight: whether the cycle's cascade is the imagination's.
    task_weight, imagination_weight, cycle_weight: of the loss parts.
    teacher_epochs: epochs of phase "teacher", before the student's begin.
    bert: for text as token ids, see `bert.setup`; teacher and student have one each.

  Returns:
    The system. Phase "student" logs the parts ce (the task's), mse and cycle.
  """
  if pooling not in POOLINGS:
    raise ValueError(f"pooling is {pooling!r}, expected one of {POOLINGS}.")
  encoder = bert_lib.setup(bert)

  def networks(num_outputs):
    encoders = Encoders(tuple(embedding_sizes), pooling, encoder.config)
    cascade = ResidualAutoencoder(tuple(autoencoder_sizes), blocks)
    sizes = tuple(classifier_sizes)
    teacher = Teacher(encoders, Classifier(sizes, num_outputs, dropout, False))
    student = Student(
      encoders.copy(),
      cascade,
      None if share_weight else cascade.copy(),
      Classifier(sizes, num_outputs, dropout, batch_norm),
    )
    return teacher, student

  def apply(params, batch, extra, who, key=None, train=False):
    num_outputs = params["student"]["classifier"]["out"]["bias"].shape[0]
    module = networks(num_outputs)[who == "student"]
    rngs = None if key is None else {"dropout": key}
    variables = {"params": params[who]} | (extra if who == "student" else {})
    mutable = list(extra) if train else []
    out, changed = module.apply(variables, batch, train, rngs=rngs, mutable=mutable)
    scores = out.pop("scores")
    out["prediction"] = scores[:, 0] if num_outputs == 1 else scores
    return out, {**extra, **changed}

  def init(key, spec):
    example = types.example_batch(spec)

    @jax.jit
    def init_both(key):
      keys, modules = jax.random.split(key), networks(spec.num_classes or 1)
      return [module.init(k, example) for k, module in zip(keys, modules, strict=True)]

    teacher, student = init_both(key)
    params = {"teacher": teacher["params"], "student": student["params"]}
    extra = {"batch_stats": student["batch_stats"]} if batch_norm else {}
    for part in params.values():
      part["encoders"] = encoder.with_weights(part["encoders"])
    return params, extra

  def predict(params, batch, extra):
    return apply(params, batch, extra, "student")[0]

  def task_loss(prediction, label):
    classes = 0 if prediction.ndim == 1 else prediction.shape[1]
    return losses.task_loss(classes)(prediction, label).mean()

  def teacher_loss(params, batch, key, extra):
    out, _ = apply(params, masking.complete(batch), extra, "teacher", key, train=True)
    return task_loss(out["prediction"], batch.label), types.Aux({}, extra)

  def student_loss(params, batch, key, extra):
    out, extra = apply(params, batch, extra, "student", key, train=True)
    frozen = jax.lax.stop_gradient(params)
    target = apply(frozen, masking.complement(batch), extra, "teacher")[0]["embedding"]
    parts = {
      "ce": task_loss(out["prediction"], batch.label),
      "mse": losses.reconstruction(out["imagined"], target),
      # the target alone is detached: the gradient runs through both cascades
      "cycle": losses.reconstruction(out["restored"], jax.lax.stop_gradient(out["embedding"])),
    }
    weights = {"ce": task_weight, "mse": imagination_weight, "cycle": cycle_weight}
    return sum(weights[name] * part for name, part in parts.items()), types.Aux(parts, extra)

  def on_epoch(params, extra, epoch, train):
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
  layers_per_block = 2 + batch_norm + (dropout > 0)  # of PyTorch's classifier, for its numbering
  rules = torch_rules(len(classifier_sizes), layers_per_block)
  return types.System(init, predict, phases, rules)


def torch_rules(
  classifier_layers: int, layers_per_block: int
) -> tuple[tuple[str, str | None], ...]:
  """Rules for the state_dicts of all networks, "A.…", "pretrained.A.…" and so on."""
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
    for n in range(classifier_layers):
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
