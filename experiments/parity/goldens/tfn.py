"""Compares TFN with a recorded MMSA run, batch norm in training and two steps of Adam included."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mmjax import optim, systems, torch_import, types
from mmjax.models import tfn

from .. import goldens

FEATURES = {"t": "text", "a": "audio", "v": "vision"}


def compare_subnets(
  z: goldens.Arrays,
  system: types.System,
  network: Any,
  rules: torch_import.Rules,
  head: str,
  optimizer: Mapping[str, Any],
) -> Iterator[goldens.Row]:
  """Yields what TFN's and LMF's comparisons have in common: all but the settings."""
  batch = goldens.feature_batch(z)
  spec = goldens.spec(batch, num_classes=goldens.num_classes(z))
  params, extra = goldens.variables(system, rules, spec, z)

  def loss(params, batch, key, extra):  # with the running statistics, as recorded
    return tfn.loss(system.predict(params, batch, extra), batch, extra)

  out = jax.jit(system.predict)(params, batch, extra)
  named = {f"output/Feature_{letter}": out[name] for letter, name in FEATURES.items()}
  named["output/Feature_f"] = np.reshape(out["feature"], z["output/Feature_f"].shape)
  named["output/M"] = np.reshape(out["prediction"], z["output/M"].shape)
  yield from goldens.compare_outputs(z, named)
  yield from goldens.compare_loss(z, rules, loss, params, batch, extra)
  yield from _compare_training(z, system, network, rules, head, params, batch, extra)
  yield from _compare_steps(
    z, loss, rules, optimizer, system.phases[0].trains, params, batch, extra
  )


def _compare_training(z, system, network, rules, head, params, batch, extra):
  """Rows of the batch norm in training."""
  under = "extra/bn_train/"
  if f"{under}M" not in z:
    return
  apply = systems.functional(network, head=head, collections=("batch_stats",)).apply
  out, _ = jax.jit(lambda p: apply(p, batch, extra, None, train=True))(params)
  yield "extra", "bn_train/M", np.reshape(out["prediction"], z[f"{under}M"].shape), z[f"{under}M"]
  gradient = jax.jit(jax.value_and_grad(system.loss, has_aux=True), static_argnums=2)
  (value, aux), grads = gradient(params, batch, None, extra)
  yield "extra", "bn_train/loss", value, z[f"{under}loss"]
  theirs = goldens.under(z, f"{under}grad/")
  yield from goldens.compare_tree("grad in training", grads, theirs, rules)
  theirs = goldens.under(z, f"{under}after/")
  statistics = {"batch_stats": aux.extra["batch_stats"]}
  yield from goldens.compare_tree("extra", statistics, theirs, rules)


def _compare_steps(z, loss, rules, optimizer, trains, params, batch, extra):
  """Rows of the parameters after some steps of the published optimizer on one batch."""
  under = "extra/after_2_steps/"
  if f"{under}losses" not in z:
    return
  adam = optim.make(**optimizer)
  trained, constant = optim.split(params, trains)

  def objective(trained):
    return loss(optim.merge(trained, constant), batch, None, extra)[0]

  trained, found = goldens.descend(objective, adam, trained, len(z[f"{under}losses"]))
  yield "extra", "after_2_steps/losses", np.asarray(found["losses"]), z[f"{under}losses"]
  theirs = {k: v for k, v in goldens.under(z, under).items() if k != "losses"}
  yield from goldens.compare_tree("extra", optim.merge(trained, constant), theirs, rules)


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, loss and gradients, and what the file has of training."""
  config = goldens.config(z)
  audio, vision, _, fusion = config["dropouts"]
  settings: dict[str, Any] = dict(
    hidden_sizes=tuple(config["hidden_dims"]),
    text_size=config["text_out"],
    fusion_size=config["post_fusion_dim"],
    input_dropout=(audio, vision),
    fusion_dropout=fusion,
  )
  optimizer = dict(name="adam", learning_rate=config["learning_rate"])
  yield from compare_subnets(
    z, tfn.make(**settings), tfn.Tfn(**settings), tfn.TORCH_RULES, "post_fusion_3", optimizer
  )
