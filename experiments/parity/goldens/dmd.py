"""Compares DMD with a recorded run of the authors' code."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models import dmd

from .. import goldens
from . import mult

# Recorded name of an output -> ours; {m} is a modality. What is recorded as [B, D, L] …
CHANNELS_FIRST = {"origin_{m}": "origin", "recon_{m}": "restored", "s_{m}_r": "cycle"}
# … as [L, B, D] …
STEPS_FIRST = {"s_{m}": "private", "c_{m}": "shared"}
# … and as vectors.
VECTORS = {
  "proj_s_{m}": "cosine_",
  "c_{m}_sim": "aligned_",
  "last_h_{m}": "",
  **{f"repr_{{m}}_{kind}": f"repr_{kind}_" for kind in dmd.GRAPHS},
  **{f"logits_{{m}}_{kind}": f"scores_{kind}_" for kind in dmd.GRAPHS},
}
# Recorded losses -> ours.
PARTS = {
  "task_all": "task/all",
  "task_c": "task/common",
  "task": "task",
  "recon": "recon",
  "s_sr": "cycle",
  "ort": "ort",
  "sim": "margin",
}


def named_outputs(out: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The network's tensors as they were recorded."""
  named = {"output/logits_c": out["scores_common"], "output/output_logit": out["scores"]}
  for name, m in dmd.LETTERS.items():
    for theirs, ours in CHANNELS_FIRST.items():
      named[f"output/{theirs.format(m=m)}"] = jnp.swapaxes(out[f"{ours}_{name}"], 1, 2)
    for theirs, ours in STEPS_FIRST.items():
      named[f"output/{theirs.format(m=m)}"] = jnp.swapaxes(out[f"{ours}_{name}"], 0, 1)
    for theirs, ours in VECTORS.items():
      named[f"output/{theirs.format(m=m)}"] = out[f"{ours}{name}"]
    named[f"mid/self_attentions_c_{m}"] = jnp.swapaxes(out[f"attention_{name}"], 0, 1)
  return named | {f"mid/edges_{kind}": out[f"edges_{kind}"] for kind in dmd.GRAPHS}


def named_parts(parts: Mapping[str, jax.Array], weights) -> dict[str, jax.Array]:
  """The loss's terms as they were recorded: graph terms weighted, representations' "unused"."""
  named = {theirs: parts[ours] for theirs, ours in PARTS.items()}
  for name, m in dmd.LETTERS.items():
    named[f"ort_{m}"] = parts[f"ort/{name}"]
    named |= {f"task_{m}_{kind}": parts[f"task/{kind}_{name}"] for kind in dmd.GRAPHS}
  for kind, own in weights.items():
    for term, weight in zip(("reg", "logit", "repr"), own, strict=True):
      unused = "_unused" if (kind, term) == ("homo", "repr") else ""
      named[f"{kind}_{term}{unused}"] = weight * parts[f"{kind}/{term}"]
  return {f"loss/{name}": value for name, value in named.items()}


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, loss parts and gradients, and the mended orthogonality."""
  config = goldens.config(z)
  if config["metric"] != "l1":
    raise ValueError(f"metric is {config['metric']!r}; only 'l1' is here.")
  weights = {
    kind: (10.0, *config[f"w_losses_{height}"])
    for kind, height in zip(dmd.GRAPHS, ("low", "high"), strict=True)
  }
  settings = dict(
    **mult.settings_of(config),
    graph_sizes=(config["gd_size_low"], config["gd_size_high"]),
    homo_weights=(*weights["homo"][:2], 0.0),
    hetero_weights=weights["hetero"],
  )
  system = dmd.make(**settings)
  batch = goldens.feature_batch(z)
  params = goldens.params(system, dmd.TORCH_RULES, goldens.spec(batch), z)

  @jax.jit
  def run(params):
    out = system.predict(params, batch, {})
    return out, [dmd.loss_parts(out, batch.label, cosine) for cosine in dmd.COSINES]

  out, (parts, mended) = run(params)
  yield from goldens.compare_outputs(z, named_outputs(out))
  yield from mult.compare_middle(z, out)
  yield from goldens.compare_outputs(z, named_parts(parts, weights))
  yield from goldens.compare_loss(
    z,
    dmd.TORCH_RULES,
    system.loss,
    params,
    batch,
    {},
    parts={kind: f"distill_{kind}" for kind in dmd.GRAPHS}
    | {name: "" for name in ("task", "recon", "cycle", "ort", "margin")},  # compared above
  )
  yield from goldens.compare_accumulation(z)
  if "extra/ort_reshaped_last_axis" in z:
    yield "extra", "ort_reshaped_last_axis", mended["ort"], z["extra/ort_reshaped_last_axis"]
  for kind in dmd.GRAPHS:
    if f"extra/gd_prior_{kind}" in z:
      prior: Any = jax.nn.softmax(np.asarray(dmd.PRIORS[kind], np.float32) / 0.25)
      yield "extra", f"gd_prior_{kind}", prior, z[f"extra/gd_prior_{kind}"]
