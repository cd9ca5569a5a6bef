"""How fast are the meta-gradients? M³S iterations, ours and PyTorch's in turn.

python -m experiments.benchmarks.meta --quick
python -m experiments.benchmarks.meta --settings=aligned_b32,unaligned_b128 --json=meta.json

Both sides have the same weights and see the same data; their losses and meta-gradients are
compared first. Times are medians over alternating iterations; compilation is apart. Needs the
extra "parity" (torch).
"""

import gc
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
import tqdm
from absl import app, flags

from experiments.benchmarks import peers
from mmjax import masking, meta, models, recurrence, torch_import, types

_QUICK = flags.DEFINE_bool("quick", False, "The smallest setting only, in less than 3 minutes.")
_SETTINGS = flags.DEFINE_list("settings", ["aligned_b32", "aligned_b128", "unaligned_b128"],
                              "Which settings.")  # fmt: skip
_MODELS = flags.DEFINE_list("models", list(peers.MODELS), "Which systems.")
_STEPS = flags.DEFINE_list("k", ["1", "3", "5"], "Numbers of inner steps.")
_ORDERS = flags.DEFINE_list("orders", ["1", "2"], "First order, second order.")
_SECONDS = flags.DEFINE_float("seconds", 8.0, "Time for the iterations of one comparison.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")

RATE = 1e-3
# (length, width) of text, audio, vision, and rows of the support (or query) set.
SETTINGS = {
  "aligned_b32": (((50, 768), (50, 5), (50, 20)), 32),
  "aligned_b128": (((50, 768), (50, 5), (50, 20)), 128),
  "unaligned_b128": (((50, 768), (375, 5), (500, 20)), 128),
}
MAKE = {
  "misa": lambda: models.MODELS["misa"](dropout=0.0),
  "self_mm": lambda: models.MODELS["self_mm"](head_dropout=(0.0, 0.0, 0.0, 0.0)),
}


def make_batch(setting: str, seed: int = 0) -> types.Batch:
  """2B rows of noise: support, then query."""
  shapes, rows = SETTINGS[setting]
  random, rows = np.random.default_rng(seed), 2 * rows

  def modality(length, width):
    valid = np.arange(length) < random.integers(length // 2, length + 1, (rows, 1))
    x = random.normal(size=(rows, length, width)).astype(np.float32) * valid[..., None]
    return types.Modality(x, valid, np.ones((rows, length, 1), bool), np.zeros(rows, np.float32))

  label = random.uniform(-3, 3, rows).astype(np.float32)
  weight = np.ones(rows, np.float32)
  parts = (modality(*shape) for shape in shapes)
  return types.Batch(*parts, label, np.arange(rows, dtype=np.int32), weight, {})


def without_dropout(loss: types.LossFn) -> types.LossFn:
  """The Transformer of MISA has dropout that is no setting: it needs a key that is None."""
  return lambda params, batch, key, extra: loss(params, batch, None, extra)


def naive(loss: types.LossFn, mask: types.MaskFn, k: int, order: int) -> types.LossFn:
  """M³S as one would write it first: K steps unrolled, nothing recomputed."""

  def meta_loss(params, batch, key, extra):
    support, query = meta.split_support_query(batch)
    support = mask(key, support)
    adapted = params
    for _ in range(k):
      grads = jax.grad(lambda p: loss(p, support, key, extra)[0])(adapted)
      adapted = jax.tree.map(lambda p, g: p - RATE * g, adapted, grads)
    if order == 1:
      adapted = jax.lax.stop_gradient(adapted)
      adapted = jax.tree.map(lambda a, p: a + p - jax.lax.stop_gradient(p), adapted, params)
    return loss(adapted, mask(key, query), key, extra)

  return meta_loss


def compile_ours(setting, model, order, k):
  """The compiled step, its arguments, its seconds to compile, and temporaries in bytes."""
  batch = make_batch(setting)
  mask = masking.span(0.5)
  drawn = mask(jax.random.key(1), batch)  # the peers get these masks; masking is not timed
  system = MAKE[model]()
  spec = types.Spec(
    *(types.ModalitySpec(*shape) for shape in SETTINGS[setting][0]), num_train=len(batch.label)
  )
  params, extra = jax.jit(lambda key: system.init(key, spec))(jax.random.key(0))
  loss = without_dropout(system.phases[0].loss)
  keep = lambda key, batch: batch  # noqa: E731
  ours = meta.m3s(
    loss, keep, inner_steps=k, inner_optimizer=optax.sgd(RATE),
    order={1: "first", 2: "second"}[order],
  )  # fmt: skip
  args = (params, jax.tree.map(jnp.asarray, drawn), jax.random.key(2), extra)
  began = time.perf_counter()
  step = jax.jit(jax.value_and_grad(ours, has_aux=True)).lower(*args).compile()
  took = time.perf_counter() - began
  plain = jax.jit(jax.value_and_grad(naive(loss, keep, k, order), has_aux=True))
  with recurrence.plain():
    naive_bytes = plain.lower(*args).compile().memory_analysis().temp_size_in_bytes
  return system, step, args, took, step.memory_analysis().temp_size_in_bytes, naive_bytes


def make_module(model, system, setting, params):
  """The PyTorch module with our parameters in it."""
  import torch

  widths = [width for _, width in SETTINGS[setting][0]]
  module = peers.MODELS[model](*widths)
  shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
  state = torch_import.to_torch(params, shapes, system.torch_rules)
  module.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
  return module


def check(system, ours, theirs, name):
  """Raises unless losses and meta-gradients agree."""
  (value, _), grads = ours
  np.testing.assert_allclose(value, float(theirs[0]), rtol=1e-3)
  found = {name: g.detach().numpy() for name, g in theirs[1].items() if g is not None}
  mine = torch_import.to_torch(grads, {n: g.shape for n, g in found.items()}, system.torch_rules)
  for parameter, expected in found.items():
    error = np.abs(mine[parameter] - expected).max()
    if error > 2e-2 * np.abs(expected).max() + 1e-6:
      raise AssertionError(f"{name}: the meta-gradients of {parameter} differ by {error:.1e}.")


def compare(setting: str, model: str, order: int, k: int) -> list[dict]:
  """A row per peer."""
  system, step, args, compiled, temporaries, naive_bytes = compile_ours(setting, model, order, k)
  module = make_module(model, system, setting, args[0])
  support, query = (
    peers.tensors(jax.tree.map(np.asarray, part))
    for part in meta.split_support_query(jax.tree.map(np.asarray, args[1]))
  )

  def run_ours():
    return jax.block_until_ready(step(*args))

  rows = []
  for name in peers.available(order):
    theirs = peers.make_step(name, module, order, k, RATE)

    def run_theirs(theirs=theirs):
      return theirs(support, query)

    try:
      check(system, run_ours(), run_theirs(), f"{setting}, {model}, {name}")
    except RuntimeError as error:  # an operation without a derivative in this version
      print(f"{setting}, {model}: {name} cannot run ({str(error).splitlines()[0]})")
      continue
    times, began = {"ours": [], "peer": []}, time.perf_counter()
    while time.perf_counter() - began < _SECONDS.value or len(times["peer"]) < 3:
      for side, run in (("ours", run_ours), ("peer", run_theirs)):
        gc.collect()
        start = time.perf_counter()
        run()
        times[side].append(time.perf_counter() - start)
    ours_s, peer_s = (statistics.median(times[side]) for side in ("ours", "peer"))
    rows.append(
      {
        "setting": setting, "model": model, "order": order, "k": k, "peer": name,
        "ours_s": ours_s, "peer_s": peer_s, "ratio": peer_s / ours_s,
        "temp_bytes": temporaries, "naive_temp_bytes": naive_bytes, "compile_s": compiled,
      }
    )  # fmt: skip
  return rows


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
  settings = ["aligned_b32"] if _QUICK.value else _SETTINGS.value
  steps = ["1"] if _QUICK.value else _STEPS.value
  cases = [
    (setting, model, int(order), int(k))
    for setting in settings
    for model in _MODELS.value
    for order in _ORDERS.value
    for k in steps
  ]
  rows = []
  for case in tqdm.tqdm(cases, unit="case", dynamic_ncols=True):
    rows += compare(*case)
    if _JSON.value:
      text = json.dumps({"rows": rows, "grid_ratio": None, "vmap3_cost": None}, indent=1)
      pathlib.Path(_JSON.value).write_text(text, encoding="utf-8")
  shown = [
    {**row, "temp_bytes": f"{row['temp_bytes'] / 2**20:.0f} MiB",
     "naive_temp_bytes": f"{row['naive_temp_bytes'] / 2**20:.0f} MiB"}
    for row in rows
  ]  # fmt: skip
  print(tabulate.tabulate(shown, headers="keys", floatfmt=".3g"))
  print(f"device: {jax.devices()[0].device_kind}; ratio = their time / ours")


if __name__ == "__main__":
  app.run(main)
