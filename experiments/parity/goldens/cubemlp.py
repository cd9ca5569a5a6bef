"""Compares CubeMLP with a recorded run of the authors' code, and two steps of its optimizer."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import optim, types
from mmjax.models import cubemlp

from .. import goldens

# Recorded intermediates -> ours.
MIDDLE = {
  "W_t": "text",
  "cube_input": "cube",
  "classifier_input": "feature",
}


def read_batch(z: goldens.Arrays) -> types.Batch:
  """The recorded token states with their attention mask; word-level audio and vision."""
  label = jnp.asarray(z["input/labels"])
  return types.Batch(
    goldens.modality(z["input/text_states"], z["input/attention_mask"] > 0),
    goldens.modality(z["input/audio"]),
    goldens.modality(z["input/vision"]),
    label,
    jnp.arange(len(label)),
    {},
  )


def compare_steps(z, config, rules, loss, params) -> Iterator[goldens.Row]:
  """Rows of the parameters after steps of Adam on one batch, clipped by value."""
  under = "extra/after_2_adam_steps/"
  if f"{under}loss_before_each_step" not in z:
    return
  adam = optim.make(
    name="adam", learning_rate=config["learning_rate"], clip_value=config["gradient_clip"]
  )
  name = "loss_before_each_step"
  params, found = goldens.descend(loss, adam, params, len(z[under + name]))
  yield "extra", f"after_2_adam_steps/{name}", np.asarray(found["losses"]), z[under + name]
  theirs = {k: v for k, v in goldens.under(z, under).items() if k != name}
  yield from goldens.compare_tree("extra", params, theirs, rules)


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, intermediates, losses, gradients by parameters and inputs, and steps."""
  config = goldens.config(z)
  if config["activate"] != "gelu":
    raise ValueError(f"activate is {config['activate']!r}; only 'gelu' is here.")
  compose = {"sum": "mean"}  # as published
  settings = dict(
    steps=config["time_len"],
    size=config["d_common"],
    encoder=config["encoders"],
    hidden_sizes=config["d_hiddens"],
    out_sizes=config["d_outs"],
    project=config["res_project"],
    use_bias=config["bias"],
    norm_first=config["ln_first"],
    compose_steps=compose.get(config["features_compose_t"], config["features_compose_t"]),
    compose_modalities=compose.get(config["features_compose_k"], config["features_compose_k"]),
  )
  regression = config["loss"].lower()
  system, rules = cubemlp.make(**settings, regression=regression), cubemlp.torch_rules(settings)
  batch = read_batch(z)
  params = goldens.params(system, rules, goldens.spec(batch), z)

  out = jax.jit(system.predict)(params, batch, {})
  blocks = len(config["d_outs"])
  named = {f"mid/{theirs}": out[ours] for theirs, ours in MIDDLE.items()}
  named |= {f"mid/block{n}": out[f"block_{n}"] for n in range(blocks)}
  named["output/features"] = out[f"block_{blocks - 1}"]
  named["output/prediction"] = out["prediction"][:, None]
  error = out["prediction"] - batch.label
  for name, of in cubemlp.REGRESSION.items():
    named[f"extra/all_losses/{name.upper()}"] = of(error)
  yield from goldens.compare_outputs(z, named)
  for letter, name in (("a", "audio"), ("v", "vision")):  # recorded before the ReLU
    if f"mid/ln_{letter}" in z:
      yield "mid", f"ln_{letter}", out[name], np.maximum(z[f"mid/ln_{letter}"], 0)
  yield from goldens.compare_loss(
    z, rules, system.loss, params, batch, {}, parts={"task": regression}
  )

  def loss(params, x):
    modalities = {name: getattr(batch, name)._replace(x=value) for name, value in x.items()}
    return system.loss(params, batch._replace(**modalities), None, {})[0]

  x = {name: getattr(batch, name).x for name in types.MODALITIES}
  names = {name: "text_states" if name == "text" else name for name in x}
  for name, ours in jax.jit(jax.grad(loss, 1))(params, x).items():
    key = f"extra/grad_wrt_{names[name]}"
    if key in z:
      yield "grad", key, ours, z[key]
  yield from compare_steps(z, config, rules, lambda params: loss(params, x), params)
