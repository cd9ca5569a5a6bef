"""Compares MCTN with a recorded MMSA run, which runs over the batch, and with one over time."""

from collections.abc import Iterator

import jax
import numpy as np

from mmjax import optim
from mmjax.models import mctn

from .. import goldens

OUTPUTS = {
  "video_1": "vision",
  "text_1": "text",
  "audio_1": "audio",
  "join_1": "joint_first",
  "join_back": "joint_back",
  "join_2": "joint_second",
}
MIDDLE = {
  "encoder1": "joint_first",
  "encoder1#2": "joint_back",
  "encoder2": "joint_second",
  "regression.rnn": "states",
  "regression": "scores",
}
PARTS = {"task": "y", "vision": "v_unweighted", "text": "t_unweighted", "audio": "a_unweighted"}
TIME = "extra/time_major_variant/"


def compare_steps(z, config, loss, params) -> Iterator[goldens.Row]:
  """Rows of the parameters after steps of Adam on one batch, clipped by norm."""
  under = "extra/after_2_steps/"
  if f"{under}losses" not in z:
    return
  adam = optim.make(name="adam", learning_rate=config["init_lr"], clip_norm=config["grad_clip"])
  params, scalars = goldens.descend(loss, adam, params, len(z[f"{under}losses"]))
  for name, found in scalars.items():
    yield "extra", f"after_2_steps/{name}", np.asarray(found), z[under + name]
  theirs = {k: v for k, v in goldens.under(z, under).items() if k not in scalars}
  yield from goldens.compare_tree("extra", params, theirs, mctn.TORCH_RULES)


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, loss and gradients of both variants, and optimizer steps."""
  config, rules = goldens.config(z), mctn.TORCH_RULES
  batch = goldens.feature_batch(z)
  spec = goldens.spec(batch)
  if config["output_dim"] != max(spec.text.dim, spec.audio.dim, spec.vision.dim):
    raise ValueError("output_dim is not the width of the widest modality.")

  def make(over):
    return mctn.make(size=config["hid_dim"], steps=config["max_seq_len"], over=over)

  published, over_time = make("batch"), make("time")
  params = goldens.params(published, rules, spec, z)
  out = jax.jit(published.predict)(params, batch, {})
  out["scores"] = np.reshape(out["scores"], (len(batch.index), -1))
  named = {f"output/{theirs}": out[ours] for theirs, ours in OUTPUTS.items()}
  named |= {f"mid/{theirs}": out[ours] for theirs, ours in MIDDLE.items()}
  named["output/prediction"] = out["scores"]
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, rules, published.loss, params, batch, {}, parts=PARTS)
  yield from compare_steps(z, config, lambda p: published.loss(p, batch, None, {})[0], params)
  if f"{TIME}total" not in z:
    return
  out = jax.jit(over_time.predict)(params, batch, {})
  out["prediction"] = out["scores"]
  for theirs, ours in {"prediction": "prediction", **OUTPUTS}.items():
    if TIME + theirs in z:
      yield "extra", f"time_major_variant/{theirs}", out[ours], z[TIME + theirs]
  rows = goldens.compare_loss(
    z,
    rules,
    over_time.loss,
    params,
    batch,
    {},
    total=f"{TIME}total",
    gradients=f"{TIME}grad/",
    parts=dict.fromkeys(PARTS, ""),
  )
  for group, name, ours, theirs in rows:
    yield "grad over time" if "grad" in group else group, name, ours, theirs
