"""Compares GCNet with a recorded run of the authors' code, its graphs' edges and its masks."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import masking, optim, types
from mmjax.models import gcnet

from .. import goldens

NAMES = {"text": "text", "audio": "audio", "vision": "visual"}
# Recorded name of an intermediate below a graph's -> ours.
MIDDLE = {".conv1": "relational", ".conv2": "graph", ".grufusion": "recurrent", "": "hidden"}
# Recorded for all positions of the batch, for its real utterances one after the other.
NODES = (".conv1", ".conv2")
TOLERANCE = 0.005  # of the mean of a batch's masks


def _by_turn(x: Any) -> np.ndarray:
  """Recorded [U, V, ...], turn after turn -> [V · U, ...]."""
  x = np.swapaxes(x, 0, 1)
  return x.reshape(-1, *x.shape[2:])


def make_batch(z: goldens.Arrays) -> types.Batch:
  """The recorded conversations; of each utterance its speaker's features and masks."""
  host = z["input/qmask"].reshape(-1, 1) == 0

  def speakers(name):
    return np.where(host, *(_by_turn(z[f"input/{name.format(who)}"]) for who in ("host", "guest")))

  seen = speakers("{}_mask").astype(bool)  # audio, text, vision; of padding too

  def modality(name):
    m = goldens.modality(speakers(f"{NAMES[name]}_{{}}")[:, None])
    return m._replace(seen=jnp.asarray(seen[:, gcnet.ORDER.index(name), None, None]))

  text, audio, vision = (modality(name) for name in types.MODALITIES)
  real = z["input/umask"].astype(bool)
  place = real[..., None] & np.eye(real.shape[1], dtype=bool)
  kind = np.int32 if _is_classification(z) else np.float32
  return types.Batch(
    text,
    audio,
    vision,
    label=jnp.asarray(z["input/label"].reshape(-1).astype(kind)),
    index=jnp.arange(real.size),
    info={
      "place": jnp.asarray(place.reshape(real.size, -1)),
      "speaker": jnp.asarray(z["input/qmask"].reshape(-1), jnp.int32),
    },
  )


def _is_classification(z) -> bool:
  return goldens.config(z)["task"] == "classification"


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, loss parts, gradients, edges, steps of Adam, and masks."""
  config = goldens.config(z)
  for name, needed in (("base_model", "LSTM"), ("reccls_flag", False), ("lower_bound", False)):
    if config.get(name, needed) != needed:
      raise ValueError(f"{name} is {config[name]!r}; only {needed!r} is here.")
  settings: dict[str, Any] = dict(
    hidden_size=config["hidden"],
    windows=(config["windowp"], config["windowf"]),
    speakers=config["n_speakers"],
    time_attention=config["time_attn"],
    dropout=config["dropout"],
  )
  recon = dict(recon_weight=float(config["loss_recon"]))
  system, rules = gcnet.make(**settings, **recon), gcnet.torch_rules(settings)
  batch = make_batch(z)
  classes = config["n_classes"] if _is_classification(z) else 0
  params = goldens.params(system, rules, goldens.spec(batch, num_classes=classes), z)
  out = jax.jit(system.predict)(params, batch, {})
  yield from _compare_outputs(z, out)
  yield from goldens.compare_loss(z, rules, system.loss, params, batch, {})
  yield from _compare_aligned(
    z, gcnet.make(**settings, **recon, aligned=True), rules, params, batch
  )
  if "extra/reccls_log_prob" in z:
    again = jax.jit(system.predict)(params, _restored(batch, out), {})
    yield "extra", "reccls_log_prob", _scores(z, again), z["extra/reccls_log_prob"]
  yield from _compare_edges(z, settings)
  yield from _compare_steps(z, system.loss, rules, params, batch)
  yield from _compare_masks(z)


def _like(z, key, x) -> np.ndarray:
  """[V · U, ...] as recorded, turn after turn."""
  turns, count = z[key].shape[:2]
  return np.swapaxes(np.reshape(x, (count, turns, -1)), 0, 1)


def _scores(z, out) -> np.ndarray:
  return _like(z, "output/log_prob", out["prediction"])


def _compare_outputs(z, out) -> Iterator[goldens.Row]:
  real = z["input/umask"].reshape(-1) > 0
  named = {
    "output/log_prob": _scores(z, out),
    "output/hidden": _like(z, "output/hidden", out["feature"]),
    "output/reconstruction": _like(z, "output/reconstruction", out["reconstruction"]),
    "mid/lstm": _like(z, "output/hidden", out["context"]),
  }
  for graph in gcnet.GRAPHS:
    for theirs, ours in MIDDLE.items():
      key, x = f"mid/graph_net_{graph}{theirs}", out[f"{graph}_{ours}"]
      named[key] = np.asarray(x)[real] if theirs in NODES else _like(z, "output/hidden", x)
  yield from goldens.compare_outputs(z, named)


def _compare_aligned(z, system, rules, params, batch) -> Iterator[goldens.Row]:
  """Rows of the reconstruction's loss as it was meant."""
  if "extra/total_if_aligned" not in z:
    return
  gradient = jax.jit(jax.value_and_grad(system.loss, has_aux=True), static_argnums=2)
  (value, aux), grads = gradient(params, batch, None, {})
  named = {"recon_loss": aux.metrics["recon"], "total": value}
  named = {f"extra/{name}_if_aligned": part for name, part in named.items()}
  yield from goldens.compare_outputs(z, named)
  theirs = goldens.under(z, "extra/grad_if_aligned/")
  yield from goldens.compare_tree("grad if aligned", grads, theirs, rules)


def _restored(batch: types.Batch, out) -> types.Batch:
  """The batch whose features are all reconstructed."""
  start = 0
  for name in gcnet.ORDER:
    m = getattr(batch, name)
    stop = start + m.x.shape[-1]
    x = out["reconstruction"][:, None, start:stop]
    batch, start = batch._replace(**{name: types.modality(x)}), stop
  return batch


def _compare_edges(z, settings) -> Iterator[goldens.Row]:
  """Rows of the graphs over the batch, whose nodes are real utterances, and over one of them."""
  real, speaker = z["input/umask"] > 0, z["input/qmask"].astype(np.int32)
  edge = np.asarray(gcnet.edges(real, settings["windows"]))
  node = np.cumsum(real.reshape(-1)).reshape(real.shape) - 1
  at = np.argwhere(edge)  # conversation, receiver, sender
  for graph, relations in gcnet.RELATIONS.items():
    key = f"extra/edges_{graph}"
    if f"{key}/relation" in z:
      ends = np.stack([node[at[:, 0], at[:, 2]], node[at[:, 0], at[:, 1]]])
      yield "edges", f"{graph}/source_target", ends, z[f"{key}/source_target"]
      relation, _ = relations(speaker, settings["speakers"])
      yield "edges", f"{graph}/relation", np.asarray(relation)[edge], z[f"{key}/relation"]
  for key, recorded in goldens.under(z, "extra/edge_perms/").items():
    match = re.fullmatch(r"len(\d+)_wp(-?\d+)_wf(-?\d+)", key)
    assert match is not None, key
    length, past, future = map(int, match.groups())
    edge = gcnet.edges(jnp.ones((1, length), bool), (past, future))[0]
    found = np.argwhere(np.asarray(edge).T)  # sender, receiver
    yield "edges", key, found, recorded[np.lexsort(recorded.T[::-1])]


def _compare_steps(z, loss, rules, params, batch) -> Iterator[goldens.Row]:
  """Rows of the parameters after some steps of Adam on the batch."""
  under, config = "extra/after_2_adam_steps/", goldens.config(z)
  if f"{under}loss_before_each_step" not in z:
    return
  adam = optim.make(name="adam", learning_rate=config["lr"], weight_decay=config["l2"])
  theirs = goldens.under(z, under)
  before = theirs.pop("loss_before_each_step")
  params, found = goldens.descend(lambda p: loss(p, batch, None, {})[0], adam, params, len(before))
  yield "extra", "loss_before_each_step", np.asarray(found["losses"]), before
  yield from goldens.compare_tree("extra after 2 steps", params, theirs, rules)


def _compare_masks(z) -> Iterator[goldens.Row]:
  """Rows of the masks that recorded draws give, and of the attempt that was taken."""
  for key, mask in goldens.under(z, "extra/random_mask/").items():
    if not key.endswith("/mask"):
      continue
    name = key.removesuffix("/mask")
    match = re.fullmatch(r"rate([\d.]+)_n\d+", name)
    assert match is not None, name
    ours, attempt = _draw(1 - float(match[1]), goldens.under(z, f"extra/random_mask/{name}/"))
    yield "masks", name, ours[: len(mask)], mask
    views = z.get(f"extra/random_mask/{name}/draw_view")
    if views is not None:
      yield "masks", f"{name}/attempt", np.asarray(attempt), np.asarray(len(views) - 1)


def _draw(kept: float, draws: goldens.Arrays) -> tuple[np.ndarray, int]:
  """The published procedure on its draws: the first masks whose mean is near `kept`."""
  if kept == 1:
    return np.ones_like(draws["mask"]), 0
  views = draws["draw_view"][..., 0]
  if kept <= 1 / 3:
    nobody = np.full((*views[0].shape, 3), 1)
    return np.asarray(masking.at_least_one(views[0], nobody, 0)).astype(int), 0
  for attempt, (view, *pair) in enumerate(
    zip(views, draws["draw_100_first"], draws["draw_100_second"], strict=True)
  ):
    rows = len(view)
    count = 3 * rows * kept - rows  # beside those that stay in any case
    overlap = (view[:, None] == np.arange(3)) & (pair[0] < int(100 * count / (3 * rows)))
    keep = int(100 * count / (1 - overlap.sum() / count) / (3 * rows))
    mask = np.asarray(masking.at_least_one(view, pair[1], keep))
    if abs(kept - mask.mean()) < TOLERANCE:
      return mask.astype(int), attempt
  return np.zeros_like(draws["mask"]), -1  # none was taken
