"""Compares MMIM with a recorded MMSA run: both stages, and the entropy with a full memory."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import losses
from mmjax.models import mmim

from .. import goldens

FEATURES = {
  "Feature_t": "utt_text",
  "Feature_a": "utt_audio",
  "Feature_v": "utt_vision",
  "Feature_f": "fusion",
}


def memory(z: goldens.Arrays, size: int) -> dict[str, mmim.Memory]:
  """The recorded memory as moments: all samples in slot 0, which counts as well as any."""

  def slots(pair):
    sides = [
      mmim.moments(jnp.asarray(x), jnp.ones(len(x)))
      for x in (z[f"input/mem_{pair}_{side}"] for side in ("pos", "neg"))
    ]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sides)
    return jax.tree.map(lambda a: jnp.zeros((size, *a.shape)).at[0].set(a), both)

  return {pair: slots(pair) for pair in mmim.PAIRS}


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, loss parts, and the gradients of both stages."""
  config = goldens.config(z)
  for name, only in (("add_va", False), ("n_layer", 1), ("cpc_layers", 1), ("contrast", True)):
    if config[name] != only:
      raise ValueError(f"{name} is {config[name]!r}; only MMIM with {only!r} is here.")
  size = config["mem_size"]
  system = mmim.make(
    lstm_sizes=(config["d_ah"], config["d_vh"]),
    out_sizes=(config["d_aout"], config["d_vout"]),
    hidden_size=config["d_prjh"],
    contrast_weight=config["alpha"],
    mi_weight=config["beta"],
    memory_size=size,
    bert=config["bert_config"],
  )
  batch = goldens.batch(z)
  params = goldens.params(system, mmim.TORCH_RULES, goldens.spec(batch), z)
  past = memory(z, size)
  extra = {"batches": jnp.int32(size + 1), "memory": past}
  out = jax.jit(system.predict)(params, batch, extra)
  named = {f"output/{theirs}": out[ours] for theirs, ours in FEATURES.items()}
  named["output/M"] = np.reshape(out["prediction"], z["output/M"].shape)
  named["mid/bert"] = out["text_states"]
  for name in ("mu_tv", "logvar_tv", "mu_ta", "logvar_ta"):
    named[f"mid/{name}"] = out[name]
  for name in ("text", "audio", "vision"):
    nce = losses.info_nce(out[f"utt_{name}"], out[f"predicted_{name}"]).mean()
    named[f"mid/nce_{name[0]}"] = nce
  for pair in mmim.PAIRS:
    projected = np.asarray(out[f"projected_{pair}"])
    named[f"output/pn_{pair}_pos"] = projected[np.asarray(batch.label) > 0]
    named[f"output/pn_{pair}_neg"] = projected[np.asarray(batch.label) < 0]
  found = {
    "lld": mmim.log_likelihood(out),
    "nce": mmim.contrast(out),
    "H": mmim.entropy(out, batch.label, past)[0],
  }
  named |= {f"output/{name}": value for name, value in found.items()}
  full = {**extra, "batches": jnp.int32(size)}  # the step before the entropy enters
  mi, main = system.phases
  named["loss/total_without_H"] = jax.jit(lambda: main.loss(params, batch, None, full)[0])()
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, mmim.TORCH_RULES, main.loss, params, batch, extra)
  yield from goldens.compare_loss(
    z,
    mmim.TORCH_RULES,
    mi.loss,
    params,
    batch,
    extra,
    total="loss/stage0_neg_lld",
    gradients="grad_stage0_neg_lld/",
  )
