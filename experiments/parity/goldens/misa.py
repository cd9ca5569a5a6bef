"""Compares MISA with a recorded MMSA run."""

from collections.abc import Iterator

import jax
import numpy as np

from mmjax.models import misa

from .. import goldens

# Intermediates by the names that they were recorded under.
MIDDLE = {f"mid/project_{m}": f"utt_{m}_orig" for m in "tva"}


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, loss parts and gradients."""
  config = goldens.config(z)
  if config.get("rnncell", "lstm") != "lstm":
    raise ValueError(f"rnncell is {config['rnncell']!r}; only MISA with LSTMs is here.")
  system = misa.make(
    hidden_size=config["hidden_size"],
    diff_weight=config["diff_weight"],
    sim_weight=config["sim_weight"],
    recon_weight=config["recon_weight"],
    bert=config["bert_config"],
  )
  batch = goldens.batch(z)
  params = goldens.params(
    system, misa.TORCH_RULES, goldens.spec(batch, num_classes=goldens.num_classes(z)), z
  )
  out = jax.jit(system.predict)(params, batch, {})
  named = {f"output/{name}": value for name, value in out.items()}
  named["output/M"] = np.reshape(out["prediction"], z["output/M"].shape)
  named |= {key: out[name] for key, name in MIDDLE.items()}
  named["mid/fusion_transformer"] = np.swapaxes(out["fusion"], 0, 1)
  named["mid/bert"] = out["text_states"]
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, misa.TORCH_RULES, system.loss, params, batch, {})
