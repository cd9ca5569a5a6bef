"""GCNet: graph completion over conversations whose utterances lack modalities (Lian et al. 2022).

An utterance is one vector, what is observed of its modalities side by side. A BiLSTM reads the
conversation, two graphs pass messages between utterances that lie near each other (one tells past
from future, one tells who speaks), a BiLSTM reads what each gives, and from their sum every
utterance's sentiment is predicted and what it lacks is reconstructed.

Paper: https://arxiv.org/abs/2203.02177. Parity: the authors' code and its quirks, see `Gcnet` and
`make`. They read utterance vectors of their own; here a modality's vector is the mean of its
observed steps, of BERT's states for token ids.

Its data are grouped in conversations (`conversations.group`; the binaries do it). A sample of a
batch that is not is a conversation of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, systems, torch_import, types

Array = types.Array
ORDER = ("audio", "text", "vision")  # of the modalities in an utterance's vector
GRAPHS = ("temporal", "speaker")


class StackedBiLSTM(nn.Module):
  """nn.LSTM of two bidirectional layers with dropout between; `features` is H per direction."""

  features: int
  dropout: float

  @nn.compact
  def __call__(self, x: Array, valid: Array | None) -> Array:
    """[V, U, D] -> [V, U, 2H]; with `valid` [V, U] it leaves padding out."""
    x, _ = layers.BiLSTM(self.features, name="layer_0")(x, valid)
    return layers.BiLSTM(self.features, name="layer_1")(layers.Dropout(self.dropout)(x), valid)[0]


class Utterances(nn.Module):
  """[B, D] by modality, the mean of its observed real steps; zero where there is none."""

  bert: bert_lib.BertConfig

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    found = {"text": bert_lib.text_states(self.bert, batch)}
    found |= {name: masking.observed(getattr(batch, name)) for name in types.MODALITIES[1:]}
    means = {}
    for name, x in found.items():
      kept = jnp.broadcast_to(_observed(getattr(batch, name)), x.shape)
      count = jnp.maximum(kept.sum(1), 1).astype(x.dtype)
      means[name] = jnp.where(kept, x, jnp.zeros((), x.dtype)).sum(1) / count
    return means


def _observed(m: types.Modality) -> Array:
  """[B, L, 1 or D] bool: what is real and observed."""
  return (m.seen[..., None] if m.x.ndim == 2 else m.seen) & m.valid[..., None]


def missing_share(m: types.Modality) -> Array:
  """[B, 1 or D]: the share of a modality's real steps that is missing; 0 where none is real."""
  real, kept = m.valid.sum(1)[:, None], _observed(m).sum(1)
  return (real - kept) / jnp.maximum(real, 1)


def edges(real: Array, windows: Sequence[int]) -> Array:
  """Which utterances send to which.

  An utterance j sends to max(0, j - past) … j + future and to itself. So one that receives hears
  from as many later ones as `past` says: the published windows lie around the sender.

  Args:
    real: [V, U] bool, False on padding.
    windows: (past, future); -1 has no bound.

  Returns:
    [V, U, U] bool, receivers before senders.
  """
  chex.assert_rank(real, 2)
  step = jnp.arange(real.shape[1])
  ahead = step[:, None] - step[None]  # of the receiver
  past, future = windows
  near = ((past < 0) | (ahead >= -past)) & ((future < 0) | (ahead <= future))
  return near[None] & real[:, :, None] & real[:, None, :]


def temporal_relations(speaker: Array, speakers: int) -> tuple[Array, int]:
  """0 where the receiver is later than the sender, 1 for itself, 2 where it is earlier.

  Args:
    speaker: [V, U] int32.
    speakers: unused.

  Returns:
    [V, U, U] int32, receivers before senders; and the number of relations.
  """
  del speakers
  step = jnp.arange(speaker.shape[1])
  relation = 1 - jnp.sign(step[:, None] - step[None])
  return jnp.broadcast_to(relation[None], (*speaker.shape, speaker.shape[1])), 3


def speaker_relations(speaker: Array, speakers: int) -> tuple[Array, int]:
  """A relation for each pair (receiver's speaker, sender's speaker), see `temporal_relations`."""
  return speaker[:, :, None] * speakers + speaker[:, None, :], speakers**2


RELATIONS = {"temporal": temporal_relations, "speaker": speaker_relations}


class RelationalGraph(nn.Module):
  """RGCN: a node's own transform, and the mean over the neighbours of each relation through its.

  Attributes:
    features: of a node's result.
    relations: their number.
  """

  features: int
  relations: int

  @nn.compact
  def __call__(self, x: Array, edge: Array, relation: Array) -> Array:
    """x [V, U, D], edge and relation [V, U, U] (receivers before senders) -> [V, U, features]."""
    init, shape = layers.xavier_uniform, (x.shape[-1], self.features)
    weights = self.param("relations", init, (self.relations, *shape))
    y = x @ self.param("root", init, shape)
    y = y + self.param("bias", nn.initializers.zeros, (self.features,))[None, None]
    for number in range(self.relations):
      own = (edge & (relation == number)).astype(x.dtype)
      mean = own @ x / jnp.maximum(own.sum(-1, keepdims=True), 1)
      y = y + mean @ weights[number]
    return y


class GraphNet(nn.Module):
  """One graph over a conversation, and the recurrence over what it gives.

  Attributes:
    features: of the graph's layers.
    dropout: between the recurrence's layers.
    relations: of the graph.
    time_attention: whether every step then attends to all steps of its conversation.
  """

  features: int
  dropout: float
  relations: int
  time_attention: bool

  @nn.compact
  def __call__(
    self, x: Array, edge: Array, relation: Array, real: Array, valid: Array | None
  ) -> dict[str, Array]:
    """Passes messages.

    Args:
      x: [V, U, D].
      edge, relation: [V, U, U], see `RelationalGraph`.
      real: [V, U] bool.
      valid: what the recurrence leaves out, or None.

    Returns:
      "relational", "graph" [V, U, features], "recurrent" [V, U, 2 (D + features)] and "hidden"
      [V, U, D + features].
    """
    z = RelationalGraph(self.features, self.relations, name="relational")(x, edge, relation)
    graph = layers.Dense(self.features, name="neighbours")(edge.astype(z.dtype) @ z)
    graph = graph + layers.Dense(self.features, use_bias=False, name="own")(z)
    nodes = jnp.where(real[..., None], jnp.concatenate([x, graph], -1), 0)
    width = nodes.shape[-1]
    states = StackedBiLSTM(width, self.dropout, name="rnn")(nodes, valid)
    out = {"relational": z, "graph": graph, "recurrent": states}
    if self.time_attention:
      query = layers.Dense(2 * width, name="query")(states)
      scores = jnp.tanh(jnp.einsum("vtd,vsd->vts", query, states))
      # not -inf: a conversation of padding alone must not become NaN
      scores = jnp.where(real[:, None], scores, jnp.finfo(scores.dtype).min)
      states = jax.nn.softmax(scores, -1) @ states
    return out | {"hidden": jax.nn.relu(layers.Dense(width, name="linear")(states))}


class Gcnet(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    hidden_size: h of the recurrence over the conversation, per direction; the graphs have h / 2.
    windows: (past, future), how far an utterance sends, see `edges`; -1 has no bound.
    speakers: whom the data tell apart (`info["speaker"]`, see `conversations.group`).
    time_attention: whether the graphs' recurrences are followed by attention over time.
    dropout: between the layers of the recurrences.
    pack: False is published: recurrences run through the padding, up to the longest conversation
      of the split, so that the backward ones begin there. True leaves padding out.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  hidden_size: int = 100
  windows: Sequence[int] = (2, 2)
  speakers: int = 1
  time_attention: bool = False
  dropout: float = 0.5
  pack: bool = False
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, train: bool) -> dict[str, Array]:
    """`train` adds what the reconstruction's loss reads."""
    place = types.places(batch)
    rows, length = place.shape
    chex.assert_is_divisible(rows, length)
    real = place.any(-1).reshape(-1, length)
    speaker = batch.info.get("speaker", jnp.zeros(rows, jnp.int32)).reshape(-1, length)
    speaker = jnp.minimum(speaker, self.speakers - 1)

    def by_turn(x):
      return x.reshape(-1, length, x.shape[-1])

    def by_row(x):
      return x.reshape(rows, x.shape[-1])

    encode = Utterances(self.bert.config, name="utterances")
    vectors = encode(batch)
    x = by_turn(jnp.concatenate([vectors[name] for name in ORDER], -1))
    valid = real if self.pack else None
    context = StackedBiLSTM(self.hidden_size, self.dropout, name="rnn")(x, valid)
    edge = edges(real, self.windows)
    out, hidden = {"context": context}, 0.0
    for graph in GRAPHS:
      relation, count = RELATIONS[graph](speaker, self.speakers)
      net = GraphNet(self.hidden_size // 2, self.dropout, count, self.time_attention, name=graph)
      given = net(context, edge, relation, real, valid)
      hidden = hidden + given["hidden"]
      out |= {f"{graph}_{name}": value for name, value in given.items()}
    out = {name: by_row(value) for name, value in (out | {"feature": hidden}).items()}
    scores = layers.Dense(self.num_outputs, name="head")(out["feature"])
    out |= {"prediction": layers.prediction(scores)}
    width = x.shape[-1]
    out["reconstruction"] = layers.Dense(width, name="reconstruction")(out["feature"])
    if train:
      # a BERT must not learn to be easy to reconstruct; of features this stops nothing
      clean = jax.lax.stop_gradient(encode(masking.complete(batch)))
      out["target"] = jnp.concatenate([clean[name] for name in ORDER], -1)
      out["missing"] = jnp.concatenate(
        [
          # each modality counts as one, however wide it is
          jnp.broadcast_to(
            missing_share(getattr(batch, name)) / clean[name].shape[1], clean[name].shape
          )
          for name in ORDER
        ],
        -1,
      )
    return out


def loss_parts(out: dict[str, Array], batch: types.Batch, aligned: bool) -> dict[str, Array]:
  """The terms of the loss.

  Args:
    out: of the network.
    batch: B = V · U samples.
    aligned: see `make`.

  Returns:
    "task" and "recon", [] each.
  """
  place = types.places(batch)
  real = place.any(-1).astype(out["reconstruction"].dtype)
  count = jnp.maximum(real.sum(), 1)
  task = (real * losses.task(out["prediction"], batch.label)).sum() / count
  weight = real
  if not aligned:
    # turn after turn, as the code has the errors, but conversation after conversation in the mask
    turns = (place.shape[1], -1)
    weight = real.reshape(turns).T.reshape(-1)
  error = (out["reconstruction"] - out["target"]) ** 2 * out["missing"].astype(real.dtype)
  return {"task": task, "recon": (weight[:, None] * error).sum() / count}


@systems.configurable(Gcnet)
def make(network: Gcnet, *, recon_weight: float = 1.0, aligned: bool = False) -> types.System:
  """GCNet as a system of conversations; the defaults are in the middle of the published search.

  Args:
    network: settings of `Gcnet`.
    recon_weight: of the reconstruction of what is missing.
    aligned: whether an utterance's reconstruction counts by itself being real, as it was meant.
      False, as published and as every published number was made: the code lays out errors turn
      after turn and the mask of real utterances conversation after conversation, so that, unless
      all conversations are equally long, some real utterances do not count.

  Returns:
    The system. Its one phase, "main", logs the parts task and recon.
  """
  past, future = network.windows
  if min(past, future) < -1:
    raise ValueError(f"windows are {(past, future)}, expected numbers from -1 (no bound) on.")
  if network.speakers < 1 or network.hidden_size < 2:
    raise ValueError(
      f"speakers is {network.speakers} and hidden_size {network.hidden_size}, expected at least 1"
      " and 2."
    )

  def loss(out, batch, extra):
    parts = loss_parts(out, batch, aligned)
    return parts["task"] + recon_weight * parts["recon"], types.Aux(parts, extra)

  system = systems.supervised(network, loss, head="head", hessian="symmetric")
  return system._replace(conversations=True)


def _lstm_rules(prefix: str, path: str) -> torch_import.Rules:
  """Rules for the two-layer bidirectional nn.LSTM at a regex: a `StackedBiLSTM`."""
  rules = []
  for theirs, ours in torch_import.LSTM.items():
    theirs = theirs.replace("_l0", r"_l(\d)")
    rules += [
      (rf"{prefix}\.{theirs}", rf"{path}/layer_\1/forward/{ours}"),
      (rf"{prefix}\.{theirs}_reverse", rf"{path}/layer_\1/backward/{ours}"),
    ]
  return tuple(rules)


def torch_rules(settings: Mapping[str, Any]) -> torch_import.Rules:
  """Rules for the authors' state_dict, whose GRU, and attention if it is off, are never used."""
  attention = r"\1/query/\2" if settings["time_attention"] else None
  net = r"graph_net_(temporal|speaker)\."
  return (
    (r"gru\..*", None),
    *_lstm_rules("lstm", "rnn"),
    (rf"{net}conv1\.weight", r"\1/relational/relations"),
    (rf"{net}conv1\.(root|bias)", r"\1/relational/\2"),
    (rf"{net}conv2\.lin_rel\.(weight|bias)", r"\1/neighbours/\2"),
    (rf"{net}conv2\.lin_root\.weight", r"\1/own/weight"),
    *(
      rule
      for graph in GRAPHS
      for rule in _lstm_rules(rf"graph_net_{graph}\.grufusion", f"{graph}/rnn")
    ),
    (rf"{net}matchatt\.transform\.(weight|bias)", attention),
    (rf"{net}linear\.(weight|bias)", r"\1/linear/\2"),
    (r"smax_fc\.(weight|bias)", r"head/\1"),
    (r"linear_rec\.(weight|bias)", r"reconstruction/\1"),
  )
