"""MCTN: the multimodal cyclic translation network (Pham et al. 2019).

The source, the text, is translated to a second modality and back, by one sequence-to-sequence
model with attention; what its encoder finds is translated to the third one. The second encoder's
states, which come from the source alone, predict. So MCTN does not notice at test time whether the
other modalities are missing, and is helpless without its source.

Paper: https://arxiv.org/abs/1812.07809. Parity: MMSA's implementation and its quirks: decoders
always read the true target of the step before, padding counts, the first step of a translation is
zero. MMSA's recurrences and attention run over the samples of a batch in the place of the steps,
by a mistake with the axes; here they run over the steps, by the same weights, unless
`over="batch"`. (The authors' code is another: hard sigmoids, tied gates, decoders without input.)

With missing data, everything that the network reads is what is observed, and the targets are the
complete features; the source is translated back to what was observed of it.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, recurrence, systems, torch_import, types

Array = types.Array
AXES = ("time", "batch")


class Encoder(nn.Module):
  """[B, L, D] -> states [B, L, H], both directions added up, and the decoder's first state."""

  size: int

  @nn.compact
  def __call__(self, x: Array, valid: Array | None) -> tuple[Array, Array]:
    both, (forward, backward) = layers.BiLSTM(self.size, name="rnn")(x, valid)
    state = jnp.tanh(layers.Dense(self.size, use_bias=False, name="fc")(forward + backward))
    return both[..., : self.size] + both[..., self.size :], state


class Gates(nn.Module):
  """Weights of one direction of an LSTM that always starts at zero, and so has no w_hh."""

  features: int

  @nn.compact
  def __call__(self, width: int) -> tuple[Array, Array]:
    """w_ih [D, 4H] and the sum of two biases, see `layers.LSTM`."""
    init, size = layers.uniform(1 / self.features**0.5), 4 * self.features
    bias = self.param("b_ih", init, (size,)) + self.param("b_hh", init, (size,))
    return self.param("w_ih", init, (width, size)), bias


class Decoder(nn.Module):
  """The target's steps, each from the step before and from what attention finds in the source."""

  size: int

  @nn.compact
  def __call__(self, states: Array, state: Array, target: Array, valid: Array | None) -> Array:
    """states [B, L, H], state [B, H], target [B, M, D], valid [B, L] -> [B, M, D]."""
    size, width = self.size, target.shape[-1]
    kernel = self.param("attn_kernel", layers.uniform(1 / (2 * size) ** 0.5), (2 * size, size))
    v = self.param("v_kernel", layers.uniform(1 / size**0.5), (size, 1))
    weights, biases = zip(
      *(Gates(size, name=name)(width + size) for name in ("forward", "backward")), strict=True
    )
    # what does not change from step to step comes before the loop: [M - 1, B, 8H], both directions
    given = jnp.swapaxes(target[:, :-1], 0, 1) @ jnp.concatenate([w[:width] for w in weights], -1)
    given = given + jnp.concatenate(biases)[None, None]
    found = recurrence.attend_and_decode(
      given,
      states,
      states @ kernel[size:],
      True if valid is None else valid,
      state,
      kernel[:size],
      v,
      jnp.concatenate([w[width:] for w in weights], -1),
    )
    found = jnp.concatenate(found, -1)
    out = layers.Dense(width, name="fc_out")(jnp.swapaxes(found, 0, 1))
    return jnp.pad(out, ((0, 0), (1, 0), (0, 0)))


class Translation(nn.Module):
  """An encoder and a decoder: `(source, target) -> (the encoder's states, translation)`."""

  size: int

  def setup(self):
    self.encoder, self.decoder = Encoder(self.size), Decoder(self.size)

  def __call__(self, source: Array, target: Array, valid: Array | None) -> tuple[Array, Array]:
    states, state = self.encoder(source, valid)
    return states, self.decoder(states, state, target, valid)


class Head(nn.Module):
  """An LSTM whose states are weighted by attention over the steps; `size` is its width."""

  num_outputs: int
  size: int
  over: str

  @nn.compact
  def __call__(self, x: Array, valid: Array | None) -> dict[str, Array]:
    """[B, L, D] (the first two axes swapped if `over` is "batch") -> scores [B, C] …"""
    states, _ = layers.LSTM(self.size, name="rnn")(x, valid)
    states = jnp.swapaxes(states, 0, 1) if self.over == "batch" else states
    energy = jnp.tanh(layers.Dense(1, name="score")(states))[..., 0]
    if valid is not None:
      energy = jnp.where(valid, energy, jnp.finfo(energy.dtype).min)
    feature = jnp.einsum("bl,bld->bd", jax.nn.softmax(energy, -1), states)
    scores = layers.Dense(self.num_outputs, name="out")(feature)
    return {"states": states, "feature": feature, "scores": scores}


class Mctn(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    order: the source; what it is translated to and back from; the third modality.
    size: H of all recurrences.
    steps: longer sequences lose their end.
    over: what recurrences and attention run over. "time": the steps. "batch": the samples of the
      batch, as MMSA published it by mistake: each sample then hangs on those before and after it
      in the batch, in testing too, so that results depend on the batch size and on the order.
    mask_padding: whether padded steps are left out of recurrences, attention and losses, which
      MMSA's and the authors' code do not; only over "time".
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  order: Sequence[str] = ("text", "vision", "audio")
  size: int = 32
  steps: int = 50
  over: str = "time"
  mask_padding: bool = False
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    states = bert_lib.text_states(self.bert.config, batch)
    x, targets = {}, {}
    for name in types.MODALITIES:
      m = getattr(batch, name)
      x[name] = states if name == "text" else masking.observed(m)
      clean = name != self.order[0] and m.x.ndim == 3
      targets[name] = m.x if clean else x[name]
    width = max(a.shape[-1] for a in x.values())
    # over the batch, the steps are what must be as many in all of them
    longest = max(min(a.shape[1], self.steps) for a in x.values())

    def shaped(a, turn):
      a = a[:, : self.steps]
      fill = longest - a.shape[1] if self.over == "batch" else 0
      a = jnp.pad(a, ((0, 0), (0, fill), (0, width - a.shape[-1])))
      return jnp.swapaxes(a, 0, 1) if turn and self.over == "batch" else a

    source, second, third = (shaped(x[name], True) for name in self.order)
    valid: dict[str, Any] = dict.fromkeys(types.MODALITIES)
    if self.mask_padding:
      valid = {name: getattr(batch, name).valid[:, : self.steps] for name in types.MODALITIES}
    at_source, at_second, _ = (valid[name] for name in self.order)

    first = Translation(self.size, name="first")
    found, there = first(source, second, at_source)
    found_back, back = first(there, source, at_second)
    joint, further = Translation(self.size, name="second")(found, third, at_source)
    head = Head(self.num_outputs, self.size, self.over, name="head")(joint, at_source)

    out = dict(zip(self.order, (back, there, further), strict=True))
    out |= {"joint_first": found, "joint_back": found_back, "joint_second": joint}
    if self.over == "batch":
      out = {name: jnp.swapaxes(a, 0, 1) for name, a in out.items()}
    out |= {f"target_{name}": shaped(targets[name], False) for name in types.MODALITIES}
    return {**out, **head, "prediction": layers.prediction(head["scores"])}


@systems.configurable(Mctn)
def make(network: Mctn, *, weights: Sequence[float] = (0.1, 0.1, 0.1)) -> types.System:
  """MCTN as a system; the defaults are MMSA's for MOSI, but for `over`.

  Args:
    network: settings of `Mctn`.
    weights: of the squared errors of the translation to the second modality, back to the source,
      and to the third.

  Returns:
    The system. Its one phase, "main", logs the parts task, text, audio and vision: the error of
    the values (its mean magnitude, or the cross-entropy), and of what was translated to each.
  """
  if sorted(network.order) != sorted(types.MODALITIES):
    raise ValueError(f"order is {network.order}, expected all of {types.MODALITIES}.")
  if network.over not in AXES:
    raise ValueError(f"over is {network.over!r}, expected one of {AXES}.")
  if network.over == "batch" and network.mask_padding:
    raise ValueError("mask_padding: there is no padding to mask over the batch.")
  source, second, third = network.order

  def loss(out, batch, extra):
    parts = {"task": losses.task(out["prediction"], batch.label, "l1").mean()}
    for name in types.MODALITIES:
      mask = None
      if network.mask_padding:
        mask = getattr(batch, name).valid[:, : network.steps, None]
      parts[name] = losses.reconstruction(out[name], out[f"target_{name}"], mask)
    translations = jnp.stack([parts[name] for name in (second, source, third)])
    total = parts["task"] + (jnp.asarray(weights, translations.dtype) * translations).sum()
    return total, types.Aux(parts, extra)

  return systems.supervised(network, loss, head="head/out", hessian="symmetric")


def _rules():
  yield from bert_lib.torch_rules(r"text_model\.model\.", "bert")
  # the same modules again
  yield r"seq2seq\d\..*", None
  yield r"decoder\d\.attention\..*", None
  for n, name in ((1, "first"), (2, "second")):
    yield from torch_import.lstm_rules(
      rf"encoder{n}\.rnn", f"{name}/encoder/rnn", bidirectional=True
    )
    yield rf"encoder{n}\.fc\.weight", f"{name}/encoder/fc/weight"
    yield rf"attn{n}\.(attn|v)\.weight", rf"{name}/decoder/\1_kernel"
    yield rf"decoder{n}\.rnn\.weight_hh_.*", None  # of a state that is always zero
    yield from torch_import.lstm_rules(rf"decoder{n}\.rnn", f"{name}/decoder", bidirectional=True)
    yield rf"decoder{n}\.fc_out\.(weight|bias)", rf"{name}/decoder/fc_out/\1"
  yield from torch_import.lstm_rules(r"regression\.rnn", "head/rnn", bidirectional=False)
  yield r"regression\.linear\.(weight|bias)", r"head/score/\1"
  yield r"regression\.linear2\.(weight|bias)", r"head/out/\1"


TORCH_RULES = tuple(_rules())
