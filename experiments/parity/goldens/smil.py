"""Compares SMIL's meta-learning step with a recorded run of the authors' code.

Their two modalities, an image and the sound that is missing in the incomplete batch, are text and
audio here, of one step each; ψ reads the vector of the first one alone. The incomplete and the
complete batch are the rows of one batch.
"""

from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import losses, masking, optim, systems, types
from mmjax.models import smil

from .. import goldens

# Recorded layers -> ours. Those of `CONTEXT` read the first vector there; here it is followed by
# the second, which is hidden, and by a flag of each, for which we put zeros into the kernel.
LAYERS = {
  "main.img_extractor.lin": "encoder_text",
  "main.sound_extractor.lin": "encoder_audio",
  "main.fc1": "fusion/fc1",
  "main.fc2": "fusion/fc2",
  "encoder.fc0": "fusion/weights_audio",
  "encoder.fc1": "fusion/regularizer_1",
  "encoder.fc2": "fusion/regularizer_2",
}
CONTEXT = ("encoder.fc0", "encoder.fc1")
OUTPUTS = {  # recorded -> (the pass, our tensor)
  "output/pred_val_noised": ("noised", "prediction"),
  "output/pred_val_clean": ("clean", "prediction"),
  "output/f1_noised": ("noised", "joint"),
  "output/f2_noised": ("noised", "feature"),
  "output/f1_clean": ("clean", "joint"),
  "output/f2_clean": ("clean", "feature"),
  "output/recon_sound": ("noised", "restored_audio"),
  "output/clean_sound": ("clean", "vector_audio"),
  "mid/val_weights_omega": ("noised", "weights_audio"),
  "mid/val_x1_feature": ("noised", "vector_text"),
}
PARTS = {
  "meta_train": "inner",
  "val_task_noised": "task",
  "val_align_f1_unweighted": "joint",
  "val_align_f2_unweighted": "hidden",
}
WEIGHT_DECAY = 1e-4


def read_params(z: goldens.Arrays, config) -> types.Params:
  """The recorded weights as our parameters."""
  flat = {}
  for theirs, ours in LAYERS.items():
    kernel = z[f"param/{theirs}.weight"].T
    if theirs in CONTEXT:
      kernel = np.pad(kernel, ((0, config["d2"] + 2), (0, 0)))
    flat[f"{ours}/kernel"] = jnp.asarray(kernel)
    flat[f"{ours}/bias"] = jnp.asarray(z[f"param/{theirs}.bias"])
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def recorded_names(tree: types.Params, config) -> dict[str, np.ndarray]:
  """Parameters, or their gradients, as far as they were recorded, by their names there."""
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  found = {}
  for theirs, ours in LAYERS.items():
    kernel = np.asarray(flat[f"{ours}/kernel"])
    found[f"{theirs}.weight"] = (kernel[: config["d1"]] if theirs in CONTEXT else kernel).T
    found[f"{theirs}.bias"] = np.asarray(flat[f"{ours}/bias"])
  return found


def compare_named(group, prefix, z, tree, config, *, main="") -> Iterator[goldens.Row]:
  """Rows of a tree below a recorded prefix; `main` is what θ's names lack there."""
  ours = recorded_names(tree, config)
  for name, value in goldens.under(z, prefix).items():
    if main + name in ours:
      yield group, prefix + name, ours[main + name], value
    elif group.startswith("grad"):  # of heads that nothing uses
      yield group, prefix + name, np.zeros_like(value), value
    else:
      yield group, prefix + name, z[f"param/{main}{name}"], value


def read_batch(z: goldens.Arrays, config) -> types.Batch:
  """The rows of the incomplete batch, then those of the complete one."""
  lacking, rows = config["batch_train"], config["batch_train"] + config["batch_val"]
  text = np.concatenate([z["input/train_x1"], z["input/val_x1"]])
  audio = np.pad(z["input/val_x2"], ((lacking, 0), (0, 0)))
  label = np.concatenate([z["input/train_label"], z["input/val_label"]])
  kind = jnp.int32 if config["task"] == "classification" else jnp.float32
  first, second, third = (goldens.modality(a[:, None]) for a in (text, audio, np.zeros((rows, 1))))
  return types.Batch(first, second, third, jnp.asarray(label, kind), jnp.arange(rows), {})


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, loss parts, first- and second-order gradients, the inner loop, Adam's step."""
  config = goldens.config(z)
  lacking, steps = config["batch_train"], config["inner_loop"]
  network = smil.Smil(
    num_outputs=config["n_out"],
    modalities=("text", "audio"),
    missing=("audio",),
    sizes=(config["d1"], config["d2"]),
    encoder="mean",
    hidden_size=config["h"],
    centres=config["K"],
  )
  learner = smil.Learner(
    network,
    systems.functional(network, head="fusion/fc2", collections=("priors",)),
    inner_steps=steps,
    inner_rate=config["lr_inner"],
    inner_decay=1000,
    inner="all",
    order="second",
    align_weights=(config["alpha"], config["beta"]),
    kl_weight=0.0,
  )
  batch, params = read_batch(z, config), read_params(z, config)
  complete = np.arange(len(batch.index)) >= lacking
  extra = {
    "available": jnp.stack([jnp.ones_like(complete), jnp.asarray(complete)], 1),
    "priors": {"fusion": {"audio": jnp.asarray(z["input/centres"])}},
    "iteration": jnp.int32(config["iteration"]),
  }
  noise = smil.Noise(
    *(
      jnp.asarray(np.pad(z[f"input/noise_{name}"], ((0, 0), (0, config["batch_val"]), (0, 0))))
      for name in ("fc1", "fc2")
    )
  )

  def scores(out):
    prediction = out["prediction"]
    return prediction[:, None] if prediction.ndim == 1 else prediction

  def gradient(learner):
    def loss(params):
      step = learner.step(params, batch, extra, smil.Draws(inner_noise=noise))
      return step.total, step

    return jax.jit(jax.grad(loss, has_aux=True))

  grads, step = gradient(learner)(params)
  passes = {name: {**out, "prediction": scores(out)} for name, out in step.passes.items()}
  named = {key: passes[one][ours][lacking:] for key, (one, ours) in OUTPUTS.items()}
  named["output/pred_train_noised"] = passes["train"]["prediction"][:lacking]
  named |= {f"loss/{theirs}": step.parts[ours] for theirs, ours in PARTS.items()}
  named |= {"loss/total": step.total, "loss/meta_val": step.total - step.parts["inner"]}
  clean, noised = step.passes["clean"], step.passes["noised"]
  unused = losses.task(clean["prediction"], batch.label)
  named["loss/val_task_clean_unused"] = unused[lacking:].mean()
  named["loss/sound_mse_unused"] = losses.reconstruction(
    noised["restored_audio"][lacking:], clean["vector_audio"][lacking:]
  )
  yield from goldens.compare_outputs(z, named)
  yield from compare_named("grad", "grad/", z, grads, config)
  first, _ = gradient(learner._replace(order="first"))(params)
  yield from compare_named("grad first order", "extra/first_order_grad/", z, first, config)
  yield from compare_named("extra", "extra/theta_star/", z, step.adapted, config, main="main.")

  @jax.jit
  def inner(params, noise):
    def loss(params):
      step = learner._replace(inner_steps=1).step(
        params, batch, extra, smil.Draws(inner_noise=noise)
      )
      return step.parts["inner"], step.adapted

    return jax.value_and_grad(loss, has_aux=True)(params)

  theta: Any = params
  for n in range(steps):
    (value, after), own = inner(theta, jax.tree.map(lambda a, n=n: a[n : n + 1], noise))
    yield "extra", f"inner_loss/step{n}", value, z[f"extra/inner_loss/step{n}"]
    at = f"extra/inner_grad/step{n}/"
    yield from compare_named("grad inner", at, z, own, config, main="main.")
    theta = after

  tested = masking.drop("audio")(jax.random.key(0), batch)
  out = jax.jit(learner.model.predict)(params, tested, extra)
  at = "extra/test_time/"
  yield "extra", f"{at}pred", scores(out)[lacking:], z[f"{at}pred"]
  yield "extra", f"{at}recon_sound", out["restored_audio"][lacking:], z[f"{at}recon_sound"]

  adam = optim.make(name="adam", learning_rate=config["lr"], weight_decay=WEIGHT_DECAY)
  updates, _ = adam.update(grads, adam.init(params), params)
  after = optax.apply_updates(params, updates)
  yield from compare_named("extra", "extra/after_outer_adam_step/", z, after, config)
