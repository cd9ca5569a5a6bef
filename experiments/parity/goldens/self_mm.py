"""Compares Self-MM with a recorded MMSA run: outputs, loss, gradients, one table update."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import torch_import, types
from mmjax.models import self_mm

from .. import goldens

# Our names of tensors -> those that they were recorded under.
HEADS = {"fusion": ("M", "f"), "text": ("T", "t"), "audio": ("A", "a"), "vision": ("V", "v")}
MIDDLE = {"text_states": "text_model", "utt_audio": "audio_model", "utt_vision": "video_model"}


def compare_tasks(
  z: goldens.Arrays,
  system: types.System,
  rules: torch_import.Rules,
  params: types.Params,
  batch: types.Batch,
  out: Mapping[str, jax.Array],
) -> Iterator[goldens.Row]:
  """Rows of the four heads, the loss, the gradients, and the tables after the step."""
  config, tasks = goldens.config(z), self_mm.TASKS
  extra = {
    "epoch": jnp.int32(z["input/cur_epoch"] - 1),
    "met": jnp.ones(len(z["input/label_map_fusion"]), bool),
    "label": {task: jnp.asarray(z[f"input/label_map_{task}"]) for task in tasks},
    "feature": {task: jnp.asarray(z[f"input/feature_map_{task}"]) for task in tasks},
  }
  named = {}
  for task, (prediction, letter) in HEADS.items():
    recorded = z[f"output/{prediction}"]
    named[f"output/{prediction}"] = np.reshape(out[f"prediction_{task}"], recorded.shape)
    named[f"output/Feature_{letter}"] = out[f"feature_{task}"]
  named["loss/eval_L1"] = jnp.abs(out["prediction"] - batch.label).mean()
  _, aux = jax.jit(lambda: system.loss(params, batch, None, extra))()
  for when, tables in (("before", extra), ("after", aux.extra)):
    for task in tasks:
      label, feature = tables["label"][task], tables["feature"][task]
      if when == "after":
        named[f"output/ulgm_label_map_after_{task}"] = label
        named[f"output/ulgm_feature_map_after_{task}"] = feature
      found = self_mm.centers(label, feature, tables["met"], config["excludeZero"])
      for sign, center in zip(("pos", "neg"), found, strict=True):
        named[f"output/ulgm_center_{when}_{task}_{sign}"] = center
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, rules, system.loss, params, batch, extra)


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, loss parts, gradients, and label and feature tables after the step."""
  config = goldens.config(z)
  system = self_mm.make(
    lstm_sizes=(config["a_lstm_hidden_size"], config["v_lstm_hidden_size"]),
    out_sizes=(config["audio_out"], config["video_out"]),
    head_sizes=[config[f"post_{m}_dim"] for m in ("fusion", "text", "audio", "video")],
    bound=config["H"],
    exclude_zero=config["excludeZero"],
    bert=config["bert_config"],
  )
  batch = goldens.batch(z)
  params = goldens.params(
    system, self_mm.TORCH_RULES, goldens.spec(batch, config["train_samples"]), z
  )
  out = jax.jit(system.predict)(params, batch, {})
  middle = {f"mid/{name}": out[ours] for ours, name in MIDDLE.items()}
  yield from goldens.compare_outputs(z, middle)
  yield from compare_tasks(z, system, self_mm.TORCH_RULES, params, batch, out)
