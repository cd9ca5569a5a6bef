"""Compares MMIN with a recorded run of the authors' code, its variants and its first stage."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import bert, layers, masking, models, optim, torch_import, types
from mmjax.models import mmin

from .. import goldens

# Recorded names of modalities, in the order of `missing_index`, and ours.
INPUTS = {"acoustic": "audio", "visual": "vision", "lexical": "text"}
LETTERS = {"A": "audio", "L": "text", "V": "vision"}
OUTPUTS = {
  "feat_fusion_miss": "embedding",
  "feat_A_miss": "utt_audio",
  "feat_L_miss": "utt_text",
  "feat_V_miss": "utt_vision",
  "recon_fusion": "imagined",
  "recon_cycle": "restored",
  "latent": "latent",
  "latent_cycle": "latent_cycle",
  "logits": "prediction",
}
WEIGHTS = ("task_weight", "imagination_weight", "cycle_weight")
PARTS = {"ce": (1, 0, 0), "mse": (0, 1, 0), "cycle": (0, 0, 1)}
OTHER_WEIGHTS = {"weights_iemocap_1_4_2": (1, 4, 2), "weights_msp_1_2_0.5": (1, 2, 0.5)}
VARIANTS = {
  "share_weight": {"share_weight": True},
  "embd_last": {"pooling": "last"},
  "embd_attention": {"pooling": "attention"},
  "train_with_given_dropout_masks": {},
  "classifier_bn_train_nodropout": {"batch_norm": True, "dropout": 0.0},
}


class Recorded(NamedTuple):
  """The recorded network, and what its published names stand for."""

  system: types.System
  rules: torch_import.Rules


def make(config: Mapping[str, Any], weights=(1.0, 1.0, 1.0), **changes) -> Recorded:
  """The recorded network, or a variant of it."""
  settings = dict(
    embedding_sizes=[config[f"embd_size_{m}"] for m in "alv"],
    pooling=config["embd_method_a"],
    autoencoder_sizes=[int(n) for n in config["AE_layers"].split(",")],
    blocks=config["n_blocks"],
    classifier_sizes=[int(n) for n in config["cls_layers"].split(",")],
    dropout=config["dropout_rate"],
    batch_norm=config["bn"],
    share_weight=config["share_weight"],
    **dict(zip(WEIGHTS, weights, strict=True)),
  )
  settings |= changes
  return Recorded(mmin.make(**settings), models.torch_rules("mmin", **settings))


def read_batch(z: goldens.Arrays) -> types.Batch:
  """The recorded inputs; whole modalities are missing."""
  found = {}
  for column, (theirs, ours) in enumerate(INPUTS.items()):
    m = goldens.modality(z[f"input/{theirs}"])
    seen = jnp.asarray(z["input/missing_index"][:, column] > 0)[:, None, None]
    found[ours] = m._replace(seen=m.seen & seen)
  label = jnp.asarray(z["input/label"], jnp.int32)
  rows = len(label)
  return types.Batch(label=label, index=jnp.arange(rows), info={}, **found)


def given_dropout(masks: Mapping[str, np.ndarray]):
  """A context in which the student's dropouts multiply by recorded masks."""
  paths: dict[Any, str] = {("encoders", "text", "Dropout_0"): "L.dropout"}
  classifier = sorted(name for name in masks if name.startswith("C."))
  paths |= {("classifier", f"Dropout_{n}"): name for n, name in enumerate(classifier)}

  def intercept(call, args, kwargs, context):
    root = context.module
    while isinstance(root.parent, nn.Module):
      root = root.parent
    if isinstance(context.module, layers.Dropout) and isinstance(root, mmin.Student):
      return args[0] * masks.get(paths.get(context.module.path, ""), 1.0)
    return call(*args, **kwargs)

  return nn.intercept_methods(intercept)


def recorded(z: goldens.Arrays, group: str, ours: Mapping[str, Any]) -> Iterator[goldens.Row]:
  """Rows of one group, as far as their keys are recorded."""
  for key, value in ours.items():
    if key in z:
      yield group, key.removeprefix(f"{group}/"), value, z[key]


def compare_tree(
  z: goldens.Arrays, group: str, prefix: str, rules: torch_import.Rules, tree: types.Params
) -> Iterator[goldens.Row]:
  """Rows of gradients or parameters: every name that is recorded below `prefix`."""
  flat: Any = flax.traverse_util.flatten_dict(tree, sep="/")
  for name, value in goldens.under(z, prefix).items():
    path = torch_import.locate(tree, name, rules)
    if path is None:  # the published attention, which has no influence
      yield group, name, np.zeros_like(value), value
    else:
      yield group, name, flat[path], torch_import.convert(value, path)


def compare_norms(
  z: goldens.Arrays, group: str, prefix: str, rules: torch_import.Rules, grads: types.Params
) -> Iterator[goldens.Row]:
  """Rows of large gradients, of which only the norm and the sum are recorded."""
  flat = flax.traverse_util.flatten_dict(grads, sep="/")
  for name, (norm, total) in goldens.under(z, prefix).items():
    g = np.asarray(flat[torch_import.locate(grads, name, rules)], np.float64)
    root = np.sqrt(g.size)  # a sum is at most this times the norm
    ours = np.array([np.linalg.norm(g), g.sum() / root])
    yield group, f"{name} (norm, sum)", ours, np.array([norm, total / root])


def compare_student(
  z: goldens.Arrays,
  prefix: str,
  model: Recorded,
  params: types.Params,
  batch: types.Batch,
  extra: types.Extra,
) -> Iterator[goldens.Row]:
  """Rows of the student's outputs, loss parts and gradients below a prefix."""
  system, rules = model
  name = prefix.split("/")[-2] if prefix else ""
  group = {kind: f"{kind} {name}".strip() for kind in ("output", "loss", "grad")}

  @jax.jit
  def run(params):
    loss = jax.value_and_grad(system.phases[1].loss, has_aux=True)
    return system.predict(params, batch, extra), loss(params, batch, None, extra)

  with given_dropout(goldens.under(z, f"{prefix}dropout_mask/")):
    out, ((total, aux), grads) = run(params)
  if extra:  # with batch statistics, as the loss has it
    out |= train_scores(system, params, out, extra)
  found = {f"{prefix}output/{theirs}": out[ours] for theirs, ours in OUTPUTS.items()}
  found[f"{prefix}output/pred"] = jax.nn.softmax(out["prediction"])
  yield from recorded(z, group["output"], found)
  parts = {f"{prefix}loss/{part}": value for part, value in aux.metrics.items()}
  yield from recorded(z, group["loss"], {**parts, f"{prefix}loss/total": total})
  yield from compare_tree(z, group["grad"], f"{prefix}grad/", rules, grads)
  skipped = f"{prefix}gradstat_skipped/"
  yield from compare_norms(z, group["grad"], skipped, rules, grads)
  for n, number in enumerate(statistics_numbers(z)):
    for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
      key = f"{prefix}param_after_forward/C.module.{number}.{theirs}"
      if key in z:
        after = aux.extra["batch_stats"]["classifier"][f"norm_{n}"][ours]
        yield group["output"], key, after, z[key]


def train_scores(system, params, out, extra) -> dict[str, jax.Array]:
  """The scores that the classifier gives by the batch's own statistics."""
  p = params["student"]["classifier"]
  sizes = [p[f"layer_{n}"]["bias"].shape[0] for n in range(len(p) // 2)]
  module = mmin.Classifier(sizes, p["out"]["bias"].shape[0], 0.0, True)
  variables = {"params": p, "batch_stats": extra["batch_stats"]["classifier"]}
  return {"prediction": module.apply(variables, out["latent"], True, mutable="batch_stats")[0]}


def statistics_numbers(z: goldens.Arrays) -> list[str]:
  """PyTorch's numbers of the batch norms, in order."""
  found = {k.split(".")[-2] for k in z if k.endswith("running_mean")}
  return sorted(found, key=int)


def compare_steps(
  z: goldens.Arrays, config: Mapping[str, Any], model: Recorded, params: types.Params, batch
) -> Iterator[goldens.Row]:
  """Rows of optimizer steps on one batch: Adam (β₁ = 0.5), the norm of each network clipped."""
  networks = [f"student/encoders/{m}/" for m in LETTERS.values()]
  networks += [f"student/{name}/" for name in ("imagine", "cycle", "classifier")]
  optimizer = optim.make(
    learning_rate=config["lr"],
    b1=config["beta1"],
    groups=[(network, {"clip_norm": 1.0}) for network in networks],
  )
  phase = model.system.phases[1]
  trained, constant = optim.split(params, phase.trains)

  @jax.jit
  def step(trained, state):
    def loss(trained):
      return phase.loss(optim.merge(trained, constant), batch, None, {})

    (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    updates, state = optimizer.update(grads, state, trained)
    parts = jnp.stack([aux.metrics[part] for part in PARTS])
    return optax.apply_updates(trained, updates), state, parts

  state = optimizer.init(trained)
  names = sorted(k for k in z if k.startswith("after_step/loss_before_step"))
  for name in names:
    trained, state, parts = step(trained, state)
    yield "after_step", name, parts, z[name]
  after = optim.merge(trained, constant)
  prefix = f"after_step/{len(names)}/"
  yield from compare_tree(z, "after_step", prefix, model.rules, after)


def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields rows of the student, its variants, optimizer steps and the first stage."""
  config = goldens.config(z)
  if config["embd_method_a"] != config["embd_method_v"]:
    raise ValueError("audio and vision are pooled in two ways; here it is one for both.")
  model, batch = make(config), read_batch(z)
  spec = goldens.spec(batch, num_classes=config["output_dim"])
  stage1 = {f"pretrained.{name}": w for name, w in goldens.under(z, "stage1/param/").items()}
  weights = {**goldens.under(z, "param/"), **stage1}

  def load(model, weights):
    template = jax.eval_shape(lambda: model.system.init(jax.random.key(0), spec)[0])
    return torch_import.from_torch(template, weights, model.rules)

  params = load(model, weights)
  yield from compare_student(z, "", model, params, batch, {})
  for part, own in PARTS.items():
    if not goldens.under(z, f"gradpart_{part}/"):
      continue
    alone = make(config, own).system.loss
    grads = jax.jit(jax.grad(lambda p, loss=alone: loss(p, batch, None, {})[0]))(params)
    yield from compare_tree(z, "gradpart", f"gradpart_{part}/", model.rules, grads)
    yield from compare_norms(z, "gradpart", f"gradpart_{part}_stat/", model.rules, grads)
  for name, own in OTHER_WEIGHTS.items():
    if not goldens.under(z, f"variant/{name}/"):
      continue
    total = jax.jit(make(config, own).system.loss)(params, batch, None, {})[0]
    yield from recorded(z, "loss", {f"variant/{name}/loss/total": total})
  yield from compare_steps(z, config, model, params, batch)

  sizes = tuple(config[f"embd_size_{m}"] for m in "alv")
  encoders = mmin.Encoders(sizes, config["embd_method_a"], bert.setup(None))
  target: Any = encoders.apply({"params": params["teacher"]["encoders"]}, masking.complement(batch))
  found = {f"output/T_embd_{letter}": target[m] for letter, m in LETTERS.items()}
  yield from recorded(z, "output", {**found, "output/T_embds": mmin.concatenate(target)})
  for letter, theirs in (("A", "acoustic"), ("V", "visual"), ("L", "lexical")):
    for key, seen in (("miss", batch), ("reverse", masking.complement(batch))):
      shown = masking.observed(getattr(seen, INPUTS[theirs]))
      yield from recorded(z, "output", {f"output/{letter}_{key}": shown})

  for name, changes in VARIANTS.items():
    prefix = f"variant/{name}/"
    if not goldens.under(z, prefix):
      continue
    own = {**weights, **goldens.under(z, f"{prefix}param/")}
    if changes.get("share_weight"):
      own = {key: w for key, w in own.items() if not key.startswith("AE_cycle.")}
    extra = {}
    if changes.get("batch_norm"):
      norms = {}
      for n, number in enumerate(statistics_numbers(z)):
        mean, var = (own.pop(f"C.module.{number}.running_{kind}") for kind in ("mean", "var"))
        norms[f"norm_{n}"] = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
      extra = {"batch_stats": {"classifier": norms}}
    other = make(config, **changes)
    yield from compare_student(z, prefix, other, load(other, own), batch, extra)

  module = mmin.Teacher(
    num_outputs=config["output_dim"],
    embedding_sizes=sizes,
    pooling=config["embd_method_a"],
    classifier_sizes=[int(n) for n in config["cls_layers"].split(",")],
    dropout=0.0,
    bert=bert.setup(None),
  )
  out: Any = module.apply({"params": params["teacher"]}, masking.complete(batch))
  value = jax.jit(model.system.phases[0].loss)(params, batch, None, {})[0]
  found = {"feat": out["embedding"], "logits": out["prediction"]}
  named = {f"stage1/output/{name}": tensor for name, tensor in found.items()}
  yield from recorded(z, "stage1", {**named, "stage1/loss/ce": value})
