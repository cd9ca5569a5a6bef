"""Compares CENET with a recorded MMSA run."""

from collections.abc import Iterator

import jax
import numpy as np

from mmjax.models import cenet

from .. import goldens

# Recorded names of intermediates -> ours.
MIDDLE = {
  "layer0_0": "before",
  "CE_visual_transform": "transformed_vision",
  "CE_acoustic_transform": "transformed_audio",
  "CE_hv": "found_vision",
  "CE_ha": "found_audio",
  "CE": "enhanced",
  "sequence_output": "text_states",
}


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, loss and gradients."""
  system = cenet.make(bert=goldens.config(z)["bert_config"])
  batch = goldens.batch(z)
  params = goldens.params(
    system, cenet.TORCH_RULES, goldens.spec(batch, num_classes=goldens.num_classes(z)), z
  )
  out = jax.jit(system.predict)(params, batch, {})
  named = {f"mid/{theirs}": out[ours] for theirs, ours in MIDDLE.items()}
  named["output/M"] = np.reshape(out["prediction"], z["output/M"].shape)
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, cenet.TORCH_RULES, system.loss, params, batch, {})
