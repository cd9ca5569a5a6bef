"""Compares ALMT with a recorded MMSA run: outputs, loss, gradients, learning rates."""

from collections.abc import Iterator

import jax
import numpy as np

from mmjax.models import almt

from .. import goldens

# Recorded names of intermediates -> ours; those of layers follow from their number.
MIDDLE = {
  "bert": "text_states",
  "embedding_l": "embedded_text",
  "embedding_a": "embedded_audio",
  "embedding_v": "embedded_vision",
  "h_hyper": "hyper",
  "fusion": "fusion",
}


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, loss, gradients, and the rate in each epoch."""
  config = goldens.config(z)
  if len(set(config["embedding_depth"])) > 1:
    raise ValueError("the embeddings have several depths; here all have one.")
  heads = dict(zip(("text", "audio", "vision"), config["embedding_heads"], strict=True))
  system = almt.make(
    size=config["dst_feature_dims"],
    hidden_size=config["dst_feature_hidden_dims"],
    tokens=config["dst_embedding_length"],
    embedding_depth=config["embedding_depth"][0],
    embedding_heads=heads,
    text_heads=config["l_encoder_heads"],
    hyper_depth=config["AHL_depth"],
    hyper_heads=config["h_hyper_layer_heads"],
    fusion_hidden_size=config["fusion_hidden_d"],
    fusion_depth=config["fusion_layer_depth"],
    fusion_heads=config["fusion_heads"],
    bert=config["bert_config"],
  )
  batch = goldens.batch(z)
  params = goldens.params(system, almt.TORCH_RULES, goldens.spec(batch), z)
  out = jax.jit(system.predict)(params, batch, {})
  named = {f"mid/{theirs}": out[ours] for theirs, ours in MIDDLE.items()}
  named["output/M"] = np.reshape(out["prediction"], z["output/M"].shape)
  for n in range(config["AHL_depth"]):
    named |= {f"mid/l_encoder_{n}": out[f"text_{n}"], f"mid/h_hyper_layer{n}": out[f"hyper_{n}"]}
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, almt.TORCH_RULES, system.loss, params, batch, {})
  yield from goldens.compare_rates(z, config["learning_rate"])
