"""Compares MulT with recorded runs of MMSA's and the authors' code."""

from collections.abc import Iterator

import jax
import numpy as np

from mmjax import types
from mmjax.models import mult

from .. import goldens

# Flags of the authors' code that leave out the other modalities' vectors.
ONLY = {"text": "lonly", "audio": "aonly", "vision": "vonly"}


def settings_of(config):
  """The settings that MulT and DMD have in common."""
  size, heads = config["dst_feature_dim_nheads"]
  return dict(
    size=size,
    heads=heads,
    depth=config["nlevels"],
    causal=config["attn_mask"],
    kernel_sizes=tuple(config[f"conv1d_kernel_size_{m}"] for m in "lav"),
  )


def compare_middle(z: goldens.Arrays, out) -> Iterator[goldens.Row]:
  """Rows of the Transformers' outputs, recorded as [L, B, D]."""
  named = {}
  for target, t in mult.LETTERS.items():
    if target not in out:
      continue
    named[f"mid/trans_{t}_mem"] = np.swapaxes(out[f"memory_{target}"], 0, 1)
    for source, s in mult.LETTERS.items():
      if source != target:
        named[f"mid/trans_{t}_with_{s}"] = np.swapaxes(out[f"{target}_with_{source}"], 0, 1)
  yield from goldens.compare_outputs(z, named)


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, loss and gradients."""
  config = goldens.config(z)
  original = config["variant"] == "original"
  targets = tuple(name for name, flag in ONLY.items() if config.get(flag, True))
  settings = dict(**settings_of(config), positions=original, targets=targets)
  system, rules = mult.make(**settings), mult.torch_rules(settings)
  batch = goldens.feature_batch(z)
  params = goldens.params(system, rules, goldens.spec(batch, num_classes=goldens.num_classes(z)), z)
  out = jax.jit(system.predict)(params, batch, {})
  named = {f"output/Feature_{name[0]}": out[name] for name in types.MODALITIES if name in out}
  named |= {"output/Feature_f": out["feature"], "output/last_hs": out["feature"]}
  named["output/M"] = np.reshape(out["prediction"], z["output/M"].shape)
  for name, letter in mult.LETTERS.items():
    named[f"mid/proj_{letter}"] = np.swapaxes(out[f"projected_{name}"], 1, 2)
  yield from goldens.compare_outputs(z, named)
  yield from compare_middle(z, out)
  yield from goldens.compare_loss(z, rules, system.loss, params, batch, {})
  if not original:
    yield from goldens.compare_accumulation(z)
