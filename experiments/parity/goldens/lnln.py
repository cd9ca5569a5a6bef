"""Compares LNLN with a recorded run of the authors' code: outputs, losses, gradients, rates."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import bert
from mmjax.models import lnln

from .. import goldens

# Recorded names of intermediates -> ours.
MIDDLE = {
  "bert": "text_states",
  "proj_l": "embedded_text",
  "proj_a": "embedded_audio",
  "proj_v": "embedded_vision",
  "completeness_transformer": "completeness_states",
  "proxy": "generated",
  "GRL": "proxy",
  "h_hyper": "hyper",
  "fusion": "fused",
}
OUTPUTS = {
  "w": "w",
  "effectiveness_discriminator_out": "effectiveness",
  "rec_feats": "reconstructed",
  "complete_feats": "complete",
}
CLEAN = ("bert", "proj_l", "proj_a", "proj_v")  # recorded of the complete data too


def read_batch(z: goldens.Arrays):
  """The recorded batch with what is missing marked; it must read as the recorded one does."""
  batch = goldens.batch(z)
  ids = jnp.asarray(z["input/text_bert_m"][:, 0], jnp.int32)
  text = batch.text._replace(seen=ids == batch.text.x)
  found = {"text": text}
  for name in ("audio", "vision"):
    m = getattr(batch, name)
    seen = jnp.asarray(z[f"input/{name}_m"]) == m.x
    found[name] = m._replace(seen=seen)
  info = {**batch.info, "missing_rate_text": jnp.asarray(z["input/missing_rate_l"])}
  return batch._replace(info=info, **found)


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, losses, gradients, and the rate in each epoch."""
  config = goldens.config(z)
  base, model = config["base"], config["model"]
  first, dmc, dmml = model["feature_extractor"], model["dmc"], model["dmml"]
  parts = {
    "embedding": {**first, "hidden_dim": first["hidden_dims"][0]},
    "proxy": dmc["proxy_dominant_feature_generator"],
    "completeness": dmc["completeness_check"],
    "reconstructor": model["reconstructor"],
    "text": dmml["language_encoder"],
    "fusion": dmml["fuison_transformer"],
  }
  shape = {
    ours: {part: settings[theirs] for part, settings in parts.items()}
    for ours, theirs in (("depth", "depth"), ("heads", "heads"), ("hidden_size", "hidden_dim"))
  }
  hyper = dmml["hyper_modality_learning"]
  settings = dict(
    size=dmml["regression"]["input_dim"],
    tokens=first["token_length"][0],
    discriminator_size=dmc["effectiveness_discriminator"]["hidden_dim"],
    hyper_depth=hyper["depth"],
    hyper_heads=hyper["heads"],
    **shape,
  )
  system = lnln.make(
    completeness_weight=base["alpha"],
    adversarial_weight=base["beta"],
    reconstruction_weight=base["gamma"],
    task_weight=base["sigma"],
    bert=config["bert_config"],
    **settings,
  )
  module = lnln.Lnln(bert=bert.setup(config["bert_config"]), **settings)
  batch = read_batch(z)
  params = goldens.params(system, lnln.TORCH_RULES, goldens.spec(batch), z)
  out = jax.jit(lambda p: module.apply({"params": p}, batch, True))(params)
  named = {f"mid/{theirs}": out[ours] for theirs, ours in MIDDLE.items()}
  named |= {f"mid/{theirs}#2": out[f"{MIDDLE[theirs]}_complete"] for theirs in CLEAN}
  named |= {f"mid/lang_encoder_{n}": out[f"text_{n}"] for n in range(hyper["depth"])}
  width = settings["tokens"]
  for n, name in enumerate(lnln.ORDER):
    named[f"mid/rec_{name[0].replace('t', 'l')}"] = out["reconstructed"][:, n * width :][:, :width]
  named |= {f"output/{theirs}": out[ours] for theirs, ours in OUTPUTS.items()}
  named["output/sentiment_preds"] = np.reshape(out["prediction"], z["output/sentiment_preds"].shape)
  predicted = jax.jit(system.predict)(params, batch, {})
  named["output/eval_w"] = predicted["w"]
  named["output/eval_sentiment_preds"] = predicted["prediction"][:, None]
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, lnln.TORCH_RULES, system.loss, params, batch, {})
  yield from goldens.compare_rates(z, base["lr"])
