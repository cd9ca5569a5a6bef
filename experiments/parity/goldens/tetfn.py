"""Compares TETFN with a recorded MMSA run: outputs, loss, gradients, one table update."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from mmjax.models import tetfn

from .. import goldens
from . import self_mm


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields what Self-MM's comparison does, and the alignment and the Transformers."""
  config = goldens.config(z)
  system = tetfn.make(
    size=config["dst_feature_dims"],
    heads=config["nheads"],
    lstm_sizes=(config["a_lstm_hidden_size"], config["v_lstm_hidden_size"]),
    kernel_sizes=(config["conv1d_kernel_size_l"], config["conv1d_kernel_size_a"]),
    head_sizes=[config[f"post_{m}_dim"] for m in ("fusion", "text", "audio", "video")],
    bound=config["H"],
    exclude_zero=config["excludeZero"],
    bert=config["bert_config"],
  )
  batch = goldens.batch(z)
  params = goldens.params(
    system, tetfn.TORCH_RULES, goldens.spec(batch, config["train_samples"]), z
  )
  out = jax.jit(system.predict)(params, batch, {})
  named = {"mid/text_model": out["text_states"]}
  for theirs, ours in (("proj_l", "text"), ("audio_model", "audio"), ("video_model", "vision")):
    value = out[f"projected_{ours}"]  # recorded as [B, D, L]
    named[f"mid/{theirs}"] = jnp.swapaxes(value, 1, 2)
  for target, t in tetfn.LETTERS.items():
    named[f"mid/trans_{t}_mem"] = jnp.swapaxes(out[f"memory_{target}"], 0, 1)
    for source, s in tetfn.LETTERS.items():
      if source != target:
        found = out[f"{target}_with_{source}"]
        named[f"mid/trans_{t}_with_{s}"] = jnp.swapaxes(found, 0, 1)
  for name in ("audio", "vision"):
    raw = jnp.asarray(z[f"input/align_raw_{name}"])
    named[f"output/aligned_{name}"] = tetfn.align(raw, batch.text.x.shape[1])
  yield from goldens.compare_outputs(z, named)
  yield from self_mm.compare_tasks(z, system, tetfn.TORCH_RULES, params, batch, out)
