"""Compares TFR-Net with a recorded MMSA run: reconstruction, prediction, losses, gradients."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import bert, types
from mmjax.models import tfr_net

from .. import goldens

NORM = "fusion_subnet.Model.classifier.linear_trans_norm."
STATISTICS = {"mean": f"{NORM}running_mean", "var": f"{NORM}running_var"}


def read_batch(z: goldens.Arrays) -> types.Batch:
  """The recorded batch with the missing steps marked."""
  batch = goldens.batch(z)
  found = {}
  for name in types.MODALITIES:
    m = getattr(batch, name)
    if name != "text":
      m = m._replace(valid=jnp.asarray(z[f"input/{name}_mask"]) > 0)
    seen = (jnp.asarray(z[f"input/{name}_missing_mask"]) > 0) | ~m.valid
    found[name] = m._replace(seen=seen if name == "text" else seen[:, :, None])
  return batch._replace(**found)


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, loss parts and gradients, and the batch norm in training."""
  config = goldens.config(z)
  size, heads = config["dst_feature_dim_nheads"]
  depth = config["nlevels"]
  settings = dict(
    size=size,
    heads=heads,
    depth=depth,
    memory_depth=max(depth, 3),
    temporal_heads=config["num_temporal_head"],
    kernel_sizes=tuple(config[f"conv1d_kernel_size_{m}"] for m in "lav"),
    gate_sizes=tuple(config[f"fusion_{m}_hid"] for m in "tav"),
    gate_depth=config["fusion_gru_layers"],
    hidden_size=config["cls_hidden_dim"],
  )
  weights, similarity = config["weight_gen_loss"], config["weight_sim_loss"]
  system = tfr_net.make(**settings, bert=config["bert_config"])
  module = tfr_net.TfrNet(
    text_dropout=0.0,
    attention_dropout=(0.0, 0.0, 0.0),
    transformer_dropout=0.0,
    gate_dropout=0.0,
    head_dropout=0.0,
    bert=bert.setup(config["bert_config"]),
    **settings,
  )
  batch = read_batch(z)
  spec = goldens.spec(batch)
  template = jax.eval_shape(lambda: system.init(jax.random.key(0), spec)[0])
  recorded = goldens.under(z, "param/")
  norm = {ours: jnp.asarray(recorded.pop(theirs)) for ours, theirs in STATISTICS.items()}
  params = goldens.torch_import.from_torch(template, recorded, tfr_net.TORCH_RULES)
  extra = {"batch_stats": {"head_norm": norm}}

  def run(params, **how) -> Any:
    return module.apply({"params": params, **extra}, batch, generate=True, **how)

  def loss(params, batch, key, extra):  # with the running statistics, as recorded
    parts = tfr_net.loss_parts(run(params, train=False), batch, weights, similarity)
    return parts["pred"] + parts["gen"], types.Aux(parts, extra)

  out = jax.jit(lambda p: run(p, train=False))(params)
  named = {"mid/bert_text_m": out["text_states"], "mid/bert_text_complete": out["complete_text"]}
  for name, letter in tfr_net.LETTERS.items():
    named |= {
      f"output/{name}_gen": out[f"generated_{name}"],
      f"output/h_{letter}": out[f"joint_{name}"],
      f"output/h_{letter}_final": out[f"final_{name}"],
      f"mid/proj_{letter}": jnp.swapaxes(out[f"projected_{name}"], 1, 2),
      f"mid/trans_{letter}_mem": jnp.swapaxes(out[f"memory_{name}"], 0, 1),
      f"mid/rep_{name[0]}": out[f"utt_{name}"],
    }
    for source, other in tfr_net.LETTERS.items():
      if source != name:
        found = jnp.swapaxes(out[f"{name}_with_{source}"], 0, 1)
        named[f"mid/trans_{letter}_with_{other}"] = found
  named["output/M"] = np.reshape(out["prediction"], z["output/M"].shape)
  yield from goldens.compare_outputs(z, named)
  parts = {f"gen_{name}": f"gen_{name}_unweighted" for name in types.MODALITIES}
  yield from goldens.compare_loss(z, tfr_net.TORCH_RULES, loss, params, batch, extra, parts=parts)
  trained = lambda p: module.apply(  # noqa: E731
    {"params": p, **extra}, batch, generate=False, train=True, mutable=["batch_stats"]
  )
  out, changed = jax.jit(trained)(params)
  yield (
    "extra",
    "M_bn_train",
    np.reshape(out["prediction"], z["extra/M_bn_train"].shape),
    z["extra/M_bn_train"],
  )
  for ours in STATISTICS:
    key = f"extra/bn_running_{ours}_after"
    yield "extra", key, changed["batch_stats"]["head_norm"][ours], z[key]
