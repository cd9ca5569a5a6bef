"""MMIM: hierarchical mutual information maximization (Han et al. 2021).

Text is one token's BERT state (or their mean), audio and vision the last states of a BiLSTM.
Two things are maximized beside the task: a bound on the mutual information of text with audio
and with vision, and a contrastive bound between each of them and the fusion. An epoch has two
phases: "mi" fits the conditional Gaussians of the first bound, "main" trains all the rest. The
bound's entropy needs more samples than a batch, so `extra` remembers the last batches.

Paper: https://arxiv.org/abs/2109.00412. Parity: MMSA's implementation and its quirks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, systems, torch_import, types

Array = types.Array
PAIRS = {"tv": "vision", "ta": "audio"}  # text with vision, text with audio


class Memory(NamedTuple):
  """Moments of sets of samples. Sets are added up exactly, whatever their size.

  Attributes:
    count: [...] number of samples.
    mean: [..., d] their mean.
    scatter: [..., d, d] sum of (x - mean)(x - mean)ᵀ.
  """

  count: Array
  mean: Array
  scatter: Array


def moments(x: Array, chosen: Array) -> Memory:
  """Moments of the chosen [B] rows of x [B, d]."""
  weight = chosen.astype(x.dtype)
  count = weight.sum()
  mean = weight @ x / jnp.maximum(count, 1)
  centred = (x - mean[None]) * weight[:, None]
  return Memory(count, mean, centred.T @ centred)


def total_moments(parts: Memory) -> Memory:
  """The moments of the union of M sets, [M, ...] (Chan et al. 1979)."""
  count = parts.count.sum()
  mean = parts.count @ parts.mean / jnp.maximum(count, 1)
  apart = parts.mean - mean[None]
  between = jnp.einsum("m,mi,mj->ij", parts.count, apart, apart)
  return Memory(count, mean, parts.scatter.sum(0) + between)


def log_determinant(m: Memory) -> tuple[Array, Array]:
  """log |Σ| of the biased covariance, and whether it exists: [], [] bool.

  It does not with too few samples, nor where all are alike, as without their modality.
  """
  size = m.mean.shape[-1]
  covariance = m.scatter / jnp.maximum(m.count, 1)
  # against the largest determinant of this trace: what is below is rounding, and 0 is too
  largest = (jnp.trace(covariance) / size) ** size
  exists = jnp.linalg.det(covariance) > 1e-7 * largest
  # replaced before the logarithm: the gradient of what is not chosen must be finite too
  covariance = jnp.where(exists, covariance, jnp.eye(size))
  return jnp.linalg.slogdet(covariance)[1], exists


class Encoder(nn.Module):
  """[B, L, D] -> [B, out_size]: final states of a BiLSTM, projected."""

  lstm_size: int
  out_size: int

  @nn.compact
  def __call__(self, m: types.Modality) -> Array:
    _, final = layers.BiLSTM(self.lstm_size, name="rnn")(masking.observed(m), m.valid)
    return layers.Dense(self.out_size, name="out")(jnp.concatenate(final, -1))


class Gaussian(nn.Module):
  """q(y | x) as a Gaussian, and the projection whose entropy is estimated (§3.3)."""

  @nn.compact
  def __call__(self, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """x [B, D], y [B, d] -> mean and log-variance of y, [B, d], and y projected, [B, d / 4]."""
    size = y.shape[-1]

    def mlp(name):
      hidden = jax.nn.relu(layers.Dense(size, name=f"{name}_1")(x))
      return layers.Dense(size, name=f"{name}_2")(hidden)

    projected = jnp.tanh(layers.Dense(size // 4, name="entropy_projection")(y))
    return mlp("mu"), mlp("logvar"), projected


class Mmim(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    lstm_sizes: width of the audio and the vision LSTM, per direction.
    out_sizes: width of the audio and the vision vector.
    hidden_size: width of the fusion.
    dropout: of the fusion's input.
    pooling: what stands for the text: its "first" state ([CLS], as published) or the "mean"
      of the states. With precomputed states [CLS] has read words that are missing now.
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
  """

  num_outputs: int = 1
  lstm_sizes: Sequence[int] = (16, 16)
  out_sizes: Sequence[int] = (16, 16)
  hidden_size: int = 128
  dropout: float = 0.1
  pooling: str = "first"
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    states = bert_lib.text_states(self.bert.config, batch)  # [B, L, D]
    utterance = {"text": layers.pool(states, batch.text.valid, self.pooling)}
    for n, name in enumerate(("audio", "vision")):
      encoder = Encoder(self.lstm_sizes[n], self.out_sizes[n], name=f"{name}_encoder")
      utterance[name] = encoder(getattr(batch, name))
    out = {"text_states": states} | {f"utt_{name}": vector for name, vector in utterance.items()}
    for pair, name in PAIRS.items():
      gaussian = Gaussian(name=f"mi_{pair}")(utterance["text"], utterance[name])
      out |= zip((f"mu_{pair}", f"logvar_{pair}", f"projected_{pair}"), gaussian, strict=True)
    hidden = jnp.concatenate(list(utterance.values()), -1)
    hidden = layers.Dropout(self.dropout)(hidden)
    for n in (1, 2):
      hidden = jnp.tanh(layers.Dense(self.hidden_size, name=f"fusion_{n}")(hidden))
    out["fusion"] = out["feature"] = hidden
    for name, vector in utterance.items():
      out[f"predicted_{name}"] = layers.Dense(vector.shape[-1], name=f"cpc_{name}")(hidden)
    scores = layers.Dense(self.num_outputs, name="fusion_3")(hidden)
    out["prediction"] = layers.prediction(scores)
    return out


def log_likelihood(out: Mapping[str, Array]) -> Array:
  """Σ over the pairs of the mean log-likelihood, without its log-variance term, as in the code."""
  total: Any = 0.0
  for pair, name in PAIRS.items():
    error = (out[f"mu_{pair}"] - out[f"utt_{name}"]) ** 2
    total -= (error / 2 / jnp.exp(out[f"logvar_{pair}"])).sum(-1).mean()
  return total


def contrast(out: Mapping[str, Array]) -> Array:
  """Σ over the modalities of the InfoNCE loss of the vector that the fusion predicts (§3.4)."""
  total: Any = sum(
    losses.info_nce(out[f"utt_{name}"], out[f"predicted_{name}"]).mean()
    for name in types.MODALITIES
  )
  return total


def entropy(
  out: Mapping[str, Array], label: Array, memory: Mapping[str, Memory]
) -> tuple[Array, dict[str, Memory]]:
  """The entropy of audio and vision, from Gaussians of the two polarities (§3.3, eq. 8-9).

  Args:
    out: of the network.
    label: [B]; zero labels belong to neither polarity.
    memory: for each pair, moments [M, 2, ...] of the last M batches, positive and negative.

  Returns:
    [] H, its terms 0 where the samples of a polarity span no volume (there the code gives
    -inf), and the moments [2, ...] of this batch.
  """
  total: Any = 0.0
  now = {}
  for pair, past in memory.items():
    current = [moments(out[f"projected_{pair}"], side) for side in (label > 0, label < 0)]
    now[pair] = jax.tree.map(lambda *sides: jnp.stack(sides), *current)
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new[None]]), past, now[pair])
    found = [
      log_determinant(total_moments(jax.tree.map(lambda a, n=n: a[:, n], both))) for n in range(2)
    ]
    (positive, positive_exists), (negative, negative_exists) = found
    total += jnp.where(positive_exists & negative_exists, 0.25 * (positive + negative), 0.0)
  return total, now


def make_memory(network: Mmim, memory_size: int) -> dict[str, Any]:
  """`extra` before training: the moments of no batch."""
  audio, vision = network.out_sizes
  slots = {
    pair: Memory(
      jnp.zeros((memory_size, 2)),
      jnp.zeros((memory_size, 2, size // 4)),
      jnp.zeros((memory_size, 2, size // 4, size // 4)),
    )
    for pair, size in zip(PAIRS, (vision, audio), strict=True)
  }
  return {"batches": jnp.int32(0), "memory": slots}


def forget(params, extra, epoch, train):
  """`on_epoch`: each epoch starts with an empty memory."""
  del epoch, train
  return params, jax.tree.map(jnp.zeros_like, extra)


@systems.configurable(Mmim)
def make(
  network: Mmim,
  *,
  contrast_weight: float = 0.1,
  mi_weight: float = 0.1,
  memory_size: int = 1,
  mi_share: float = 1.0,
) -> types.System:
  """MMIM as a system; the defaults are MMSA's for MOSI.

  Labels that are classes have no polarity: the entropy is left out then (our choice).

  Args:
    network: settings of `Mmim`.
    contrast_weight: α, of the contrastive loss.
    mi_weight: β, of the mutual information bound.
    memory_size: M, batches whose samples join the entropy's estimate.
    mi_share: part of the epoch that phase "mi" runs; MMSA has 0.5 for MOSEI.

  Returns:
    The system. Phase "mi" logs nothing but its loss; "main" logs y, nce, lld and H.
  """
  layers.check_pooling(network.pooling)
  if memory_size < 1:
    raise ValueError(f"memory_size is {memory_size}, expected at least 1.")
  if min(network.out_sizes) < 4:
    raise ValueError(
      f"out_sizes are {network.out_sizes}, expected at least 4: their quarter is projected."
    )
  model = systems.functional(network, head="fusion_3")

  def init(key, spec):
    params = xavier_normal(jax.random.fold_in(key, 1), model.init(key, spec)[0])
    return params, {} if spec.num_classes else make_memory(network, memory_size)

  def mi_loss(out, batch, extra):
    del batch
    return -log_likelihood(out), types.Aux({}, extra)

  def main_loss(out, batch, extra):
    parts = {
      "y": losses.task(out["prediction"], batch.label, "l1").mean(),
      "nce": contrast(out),
      "lld": log_likelihood(out),
    }
    total = parts["y"] + contrast_weight * parts["nce"] - mi_weight * parts["lld"]
    if out["prediction"].ndim == 2:  # classes
      return total, types.Aux(parts, extra)
    batches, memory = extra["batches"], extra["memory"]
    value, now = entropy(out, batch.label, memory)
    parts["H"] = jnp.where(batches > memory_size, value, 0.0)
    memory = jax.tree.map(lambda slots, new: slots.at[batches % memory_size].set(new), memory, now)
    extra = {"batches": batches + 1, "memory": memory}
    return total - mi_weight * parts["H"], types.Aux(parts, extra)

  # entropy_projection has no gradient in "mi": the published optimizer never moves it
  mi, main = model.loss(mi_loss), model.loss(main_loss)
  phases = (
    types.Phase("mi", mi, trains=r"^mi_\w+/(mu|logvar)", share=mi_share, hessian="symmetric"),
    types.Phase("main", main, trains=r"^(?!mi_)", on_epoch=forget, hessian="symmetric"),
  )
  return types.System(init, model.predict, phases)


def xavier_normal(key: types.PRNGKey, params: types.Params) -> types.Params:
  """Draws every matrix outside of BERT from N(0, 2 / (rows + columns)), as the trainer does."""
  rest = {name: value for name, value in params.items() if name != "bert"}
  leaves, tree = jax.tree.flatten(rest)
  keys = jax.random.split(key, len(leaves))
  drawn = [
    layers.normal((2 / sum(x.shape)) ** 0.5)(k, x.shape) if x.ndim == 2 else x
    for k, x in zip(keys, leaves, strict=True)
  ]
  return {**params, **jax.tree.unflatten(tree, drawn)}


TORCH_RULES = (
  *bert_lib.torch_rules(r"bertmodel\.model\.", "bert"),
  *torch_import.lstm_rules(r"visual_enc\.rnn", "vision_encoder/rnn", bidirectional=True),
  *torch_import.lstm_rules(r"acoustic_enc\.rnn", "audio_encoder/rnn", bidirectional=True),
  (r"visual_enc\.linear_1\.(weight|bias)", r"vision_encoder/out/\1"),
  (r"acoustic_enc\.linear_1\.(weight|bias)", r"audio_encoder/out/\1"),
  (r"mi_(tv|ta)\.mlp_(mu|logvar)\.0\.(weight|bias)", r"mi_\1/\2_1/\3"),
  (r"mi_(tv|ta)\.mlp_(mu|logvar)\.2\.(weight|bias)", r"mi_\1/\2_2/\3"),
  (r"mi_(tv|ta)\.entropy_prj\.0\.(weight|bias)", r"mi_\1/entropy_projection/\2"),
  (r"cpc_zt\.net\.(weight|bias)", r"cpc_text/\1"),
  (r"cpc_za\.net\.(weight|bias)", r"cpc_audio/\1"),
  (r"cpc_zv\.net\.(weight|bias)", r"cpc_vision/\1"),
  (r"fusion_prj\.linear_(\d)\.(weight|bias)", r"fusion_\1/\2"),
)
