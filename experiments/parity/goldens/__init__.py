"""How recorded parity files are compared, one module per file name, and what they share.

A module has `compare(z)`, which yields (group, name, ours, recorded) for a mapping of arrays.
Groups whose name starts with "grad" are compared with the tolerance for gradients.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import optim, torch_import, types

Arrays = Mapping[str, np.ndarray]
Row = tuple[str, str, np.ndarray, np.ndarray]


def config(z: Arrays) -> dict[str, Any]:
  """The hyperparameters that the recorded model was built with."""
  return json.loads(str(z["config"]))


def num_classes(z: Arrays) -> int:
  """0 for regression, as in `Spec`."""
  settings = config(z)
  return settings["num_classes"] if settings.get("train_mode") == "classification" else 0


def under(z: Arrays, prefix: str) -> dict[str, np.ndarray]:
  """The arrays whose key starts with `prefix`, by the rest of the key."""
  return {key.removeprefix(prefix): z[key] for key in z if key.startswith(prefix)}


def each_case(compare: Callable[[Arrays], Iterator[Row]]) -> Callable[[Arrays], Iterator[Row]]:
  """Decorates a comparison: it is made of the file and of every case below "case/NAME/" in it.

  A case holds a config, weights, inputs … of its own; its groups are called "output NAME" …
  """

  @functools.wraps(compare)
  def compare_all(z):
    names = sorted({key.split("/")[1] for key in z if key.startswith("case/")})
    yield from compare({key: z[key] for key in z if not key.startswith("case/")})
    for name in names:
      for group, tensor, ours, theirs in compare(under(z, f"case/{name}/")):
        yield f"{group} {name}", tensor, ours, theirs

  return compare_all


def modality(x: np.ndarray, valid: np.ndarray | None = None) -> types.Modality:
  """Recorded features [B, L, D] or ids [B, L], all of them seen."""
  return types.modality(jnp.asarray(x, jnp.int32 if x.ndim == 2 else jnp.float32), valid)


def prefix_mask(lengths: np.ndarray | None, x: np.ndarray) -> np.ndarray:
  """[B, L] True on the first `lengths` steps of x [B, L, D]; on all without lengths."""
  steps = np.arange(x.shape[1])
  return np.ones(x.shape[:2], bool) if lengths is None else steps < lengths.reshape(-1, 1)


def batch(z: Arrays, prefix: str = "input/") -> types.Batch:
  """The batch in a model file: text_bert, audio, vision, labels, and lengths where given."""
  ids, mask, segments = z[f"{prefix}text_bert"].transpose(1, 0, 2)
  rows = len(ids)

  def features(name):
    x = z[f"{prefix}{name}"]
    return modality(x, prefix_mask(z.get(f"{prefix}{name}_lengths"), x))

  return types.Batch(
    text=modality(ids, mask),
    audio=features("audio"),
    vision=features("vision"),
    label=jnp.asarray(z[f"{prefix}labels"]).reshape(-1),
    index=jnp.asarray(z.get(f"{prefix}indexes", np.arange(rows)), jnp.int32),
    info={"segment_ids": jnp.asarray(segments, jnp.int32)} if segments.any() else {},
  )


def feature_batch(z: Arrays) -> types.Batch:
  """The batch in a file without a BERT: text, audio and vision of full length, and labels."""
  x = {name: z.get(f"input/{name}_raw", z[f"input/{name}"]) for name in types.MODALITIES}
  label = z["input/labels"].reshape(-1)
  label = jnp.asarray(label, jnp.int32 if num_classes(z) else jnp.float32)
  text, audio, vision = (modality(x[name]) for name in types.MODALITIES)
  return types.Batch(text, audio, vision, label, jnp.arange(len(label)), {})


def spec(example: types.Batch, num_train: int | None = None, **kwargs) -> types.Spec:
  """The spec of a batch."""

  def one(m):
    return types.ModalitySpec(m.x.shape[1], 0 if m.x.ndim == 2 else m.x.shape[2], m.x.ndim == 2)

  modalities = (one(getattr(example, name)) for name in types.MODALITIES)
  return types.Spec(*modalities, num_train=num_train or len(example.index), **kwargs)


def params(
  system: types.System,
  rules: torch_import.Rules,
  the_spec: types.Spec,
  z: Arrays,
  prefix: str = "param/",
) -> types.Params:
  """The recorded weights as parameters of a system."""
  return variables(system, rules, the_spec, z, prefix)[0]


def variables(
  system: types.System,
  rules: torch_import.Rules,
  the_spec: types.Spec,
  z: Arrays,
  prefix: str = "param/",
) -> tuple[types.Params, types.Extra]:
  """The recorded weights and batch statistics as parameters and `extra` of a system."""
  template, extra = jax.eval_shape(lambda: system.init(jax.random.key(0), the_spec))
  return torch_import.variables_from_torch(template, extra, under(z, prefix), rules)


def compare_outputs(z: Arrays, ours: Mapping[str, Any]) -> Iterator[Row]:
  """Rows by recorded key: "output/M" is tensor "M" of group "output"; what lacks is left out."""
  for key, value in ours.items():
    if key in z:
      group, _, name = key.partition("/")
      yield group, name, value, z[key]


def compare_loss(
  z: Arrays,
  rules: torch_import.Rules,
  loss: types.LossFn,
  weights: types.Params,
  example: types.Batch,
  extra: types.Extra,
  *,
  parts: Mapping[str, str] = {},  # noqa: B006
  total: str = "loss/total",
  gradients: str = "grad/",
) -> Iterator[Row]:
  """Rows of a loss, its parts as far as they are recorded, and every gradient.

  The gradients of parameters that we do not have, because the published model never uses
  them, must be recorded as zero.

  Args:
    z: the file.
    rules: of the model's state_dict, see `models.torch_rules`.
    loss: the loss; run without randomness.
    weights, example, extra: its arguments.
    parts: name of a metric -> its recorded name below "loss/", where they differ.
    total: key of the recorded total.
    gradients: prefix of the recorded gradients.
  """
  gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, example, None, extra), has_aux=True))
  (value, aux), grads = gradient(weights)
  metrics = {f"loss/{parts.get(name, name)}": part for name, part in aux.metrics.items()}
  yield from compare_outputs(z, {**metrics, total: value})
  group, theirs = gradients.rstrip("/"), under(z, gradients)
  recorded = torch_import.from_torch(weights, theirs, rules)
  leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(recorded), strict=True)
  for (path, ours), expected in leaves:
    yield group, jax.tree_util.keystr(path, simple=True, separator="/"), ours, expected
  for name in torch_import.ignored(theirs, rules):
    yield group, name, np.zeros_like(theirs[name]), theirs[name]


def compare_tree(
  group: str, tree: types.Params, recorded: Arrays, rules: torch_import.Rules
) -> Iterator[Row]:
  """Rows of some parameters or gradients by their published names."""
  ours = torch_import.to_torch(tree, {k: v.shape for k, v in recorded.items()}, rules)
  for name, value in ours.items():
    yield group, name, value, recorded[name]


def compare_accumulation(z: Arrays) -> Iterator[Row]:
  """Rows of Adam's step after two equal batches, whose sum is clipped by value after each."""
  settings = config(z)
  for name, rate, prefix in (
    ("adam", settings["learning_rate"], "extra/after_step/"),
    ("sgd", -1.0, "extra/accumulated_clipped_grad/"),  # from 0, a step of the sum itself
  ):
    recorded = {k: v for k, v in under(z, prefix).items() if k != "losses"}
    if not recorded:
      continue
    params: Any = {k: jnp.asarray(z[f"param/{k}"]) * float(name == "adam") for k in recorded}
    grads = {k: jnp.asarray(z[f"grad/{k}"]) for k in recorded}
    optimizer = optim.make(
      name=name, learning_rate=rate, clip_value=settings["grad_clip"], accumulate=2
    )
    # a loss with this gradient everywhere
    params, _ = descend(lambda p, g=grads: optax.tree.vdot(p, g), optimizer, params, 2)
    for key, value in recorded.items():
      yield "extra", prefix.split("/")[1] + "/" + key, params[key], value


def descend(loss: Callable, optimizer: Any, params: Any, steps: int) -> tuple[Any, dict[str, list]]:
  """Steps of an optimizer on `loss(params)`: the parameters after them, what it was before each.

  Returns:
    The parameters; and "losses" and "grad_norms", [steps] each.
  """
  # whole steps as one program: operation by operation, every shape is compiled many times

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, (value, optax.tree.norm(grads))

  state, told = jax.jit(optimizer.init)(params), []
  for _ in range(steps):
    params, state, values = step(params, state)
    told.append(values)
  losses, norms = map(list, zip(*told, strict=True))
  return params, {"losses": losses, "grad_norms": norms}


def compare_rates(z: Arrays, base: float) -> Iterator[Row]:
  """Rows of the learning rates that warm up and decay by the epoch."""
  for key, rates in under(z, "extra/lr_per_epoch_").items():
    epochs, steps = int(key), 7  # any number of steps an epoch
    schedule: Any = optim.schedule(
      {"name": "epoch_warmup_cosine", "peak": base, "epochs": epochs}, epochs * steps
    )
    ours = [schedule(epoch * steps + epoch % steps) for epoch in range(epochs)]
    yield "extra", f"lr_per_epoch_{key}", np.asarray(ours), rates
