"""How fast are the meta-gradients? M³S iterations, ours and PyTorch's in turn.

python -m experiments.benchmarks.meta --quick
python -m experiments.benchmarks.meta --json=meta.json --figure=meta.png

Both sides have the same weights and see the same data; their losses and meta-gradients are
compared first. Times are medians over alternating iterations; compilation is apart. Needs the
extra "parity" (torch, transformers); `higher` and `torchopt` join in where they are installed.
"""

import gc
import json
import math
import pathlib
import statistics
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tabulate
import tqdm
from absl import app, flags

from mmjax import evaluate, masking, meta, parallel, plots

from .. import processes
from . import cases, peers

_QUICK = flags.DEFINE_bool(
  "quick", False, "The smallest setting and PyTorch alone, unless --peers."
)
_PEERS = flags.DEFINE_list(
  "peers",
  [*peers.PEERS, "linen"],
  "Beside whom, as far as installed; linen: an unrolled inner loop over its LSTM, in JAX.",
)
_SETTINGS = flags.DEFINE_list("settings", list(cases.SETTINGS), "Which settings.")
_MODELS = flags.DEFINE_list("models", list(cases.MODELS), "Which systems.")
_STEPS = flags.DEFINE_list("k", ["1", "3", "5"], "Numbers of inner steps.")
_ORDERS = flags.DEFINE_list("orders", ["1", "2"], "First order, second order.")
_ALSO = flags.DEFINE_list(
  "also",
  ["grid", "seeds", "growth", "memory"],
  "grid: a robustness grid against a PyTorch loop; seeds: three at once against one;"
  " growth: cost against K, batch and length; memory: of K = 20.",
)
_SECONDS = flags.DEFINE_float("seconds", 8.0, "Time for the iterations of one comparison.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure of `growth`.")

GRID_ROWS, GRID_RATES, GRID_SEEDS = 686, np.arange(10) / 10, range(3)


def alternate(*sides, least: int = 3, turn_s: float = 0.3) -> list[float]:
  """Median seconds of each side; each has run once before, to warm up.

  They take turns. Short runs follow each other within a turn, as in a training: with the caches
  that they left, and after the other side's threads have stopped to spin.
  """
  times, began = [[] for _ in sides], time.perf_counter()
  seconds = min(_SECONDS.value, 1.5) if _QUICK.value else _SECONDS.value
  while time.perf_counter() - began < seconds or len(times[-1]) < least:
    for run, kept in zip(sides, times, strict=True):
      gc.collect()
      turn = time.perf_counter()
      while (start := time.perf_counter()) < turn + turn_s:
        run()
        kept.append(time.perf_counter() - start)
  return [statistics.median(kept) for kept in times]


def compare(name: str, model: str, order: int, k: int) -> list[dict]:
  """A row per peer."""
  setting = cases.SETTINGS[name]
  case = cases.prepare(model, setting)
  shares = sorted({1, math.gcd(setting.rows, jax.local_device_count())})
  steps = {devices: cases.make_step(case, order, k, devices) for devices in shares}
  module = cases.make_module(model, setting, case)
  support, query = (
    peers.tensors(jax.tree.map(np.asarray, part))
    for part in meta.split_support_query(jax.tree.map(np.asarray, case.args[1]))
  )

  rows = []
  # an LSTM by hand keeps each of 500 steps: second order, K = 3, did not end in 24 GB
  by_hand = not _QUICK.value and max(length for length, _ in setting.shapes) <= 100
  asked = ["torch"] if _QUICK.value and not _PEERS.present else _PEERS.value
  for peer in (*peers.available(order), "linen"):
    if peer not in asked or (peer in (*peers.BY_HAND, "linen") and not by_hand):
      continue
    in_jax = cases.make_linen_step(case, order, k) if peer == "linen" else None
    theirs: Any = in_jax or peers.make_step(peer, module, order, k, cases.RATE)

    def run_theirs(theirs=theirs, in_jax=in_jax):
      return theirs.run() if in_jax else theirs(support, query)

    try:
      expected = run_theirs()
    except RuntimeError as error:  # an operation without a derivative in this version
      print(f"{name}, {model}: {peer} cannot run ({str(error).splitlines()[0]})")
      continue
    for devices, step in steps.items():
      what = f"{name}, {model}, {peer}, {devices} devices"
      cases.check(case.rules, step.run(), expected, what)
    *found, peer_s = alternate(*(step.run for step in steps.values()), run_theirs)
    seconds = dict(zip(steps, found, strict=True))
    # as a training shares the rows
    devices = parallel.worthwhile(setting.rows, max(shares))
    step, ours_s = steps[devices], seconds[devices]
    rows.append(
      {
        "setting": name,
        "model": model,
        "order": order,
        "k": k,
        "peer": peer,
        "devices": devices,
        "ours_s": ours_s,
        "peer_s": peer_s,
        "ratio": peer_s / ours_s,
        "one_device_s": seconds[1],
        "all_devices_s": seconds[max(shares)],
        "temp_bytes": step.temp_bytes,
        "peer_temp_bytes": in_jax.temp_bytes if in_jax else None,
        "compile_s": step.compile_s,
      }
    )
  return rows


def compare_grids(name: str, model: str) -> dict:
  """A robustness grid as one program, and as a PyTorch loop rate by rate and batch by batch."""
  setting = cases.SETTINGS[name]
  case = cases.prepare(model, setting)
  split = cases.make_batch(setting, GRID_ROWS)
  tested = [evaluate.rate_condition(rate, mask=masking.bernoulli) for rate in GRID_RATES]
  grid = evaluate.make_grid(case.system, split, tested, GRID_SEEDS)
  run_theirs = peers.make_grid(
    cases.make_module(model, setting, case), peers.tensors(split), GRID_RATES, len(GRID_SEEDS)
  )

  def run_ours():
    params, _, _, extra = case.args
    return grid(params, extra)  # on the host: nothing is left to wait for

  began = time.perf_counter()
  run_ours()
  took = time.perf_counter() - began
  run_theirs()
  ours_s, peer_s = alternate(run_ours, run_theirs)
  return {
    "setting": name,
    "model": model,
    "ours_s": ours_s,
    "peer_s": peer_s,
    "ratio": peer_s / ours_s,
    "compile_s": took - ours_s,
  }


def compare_seeds(name: str, model: str, order: int, k: int, seeds: int = 3) -> dict:
  """Several seeds as one vmapped program, in units of one seed."""
  case = cases.prepare(model, cases.SETTINGS[name])
  step = cases.ours(case, order, k)
  params, batch, key, extra = case.args
  several = jax.tree.map(lambda a: jnp.stack([a] * seeds), (params, batch, key, extra))
  one, _ = cases.compile_timed(step, *case.args)
  together, _ = cases.compile_timed(jax.vmap(step), *several)

  def run_one():
    return jax.block_until_ready(one(*case.args))

  def run_together():
    return jax.block_until_ready(together(*several))

  run_one(), run_together()
  one_s, together_s = alternate(run_one, run_together)
  return {
    "setting": name,
    "model": model,
    "order": order,
    "k": k,
    "one_s": one_s,
    "together_s": together_s,
    "cost": together_s / one_s,
  }


def measure(model: str, setting: cases.Setting, order: int, k: int) -> tuple[float, int]:
  """Our seconds an iteration and bytes of temporaries."""
  case = cases.prepare(model, setting)
  shares = math.gcd(setting.rows, jax.local_device_count())
  step = cases.make_step(case, order, k, parallel.worthwhile(setting.rows, shares))
  step.run()
  return alternate(step.run)[0], step.temp_bytes


def growth(model: str = "self_mm") -> list[dict]:
  """Cost against the number of inner steps, the batch and the length of audio and vision."""
  rows = []

  def add(name, value, setting, order, k):
    seconds, temporaries = measure(model, setting, order, k)
    rows.append(
      {
        "against": name,
        "value": value,
        "order": order,
        "seconds": seconds,
        "temp_bytes": temporaries,
      }
    )

  text, audio, vision = cases.ALIGNED
  for order in cases.ORDERS:
    for k in (1, 3, 5, 10, 20):
      add("inner steps K", k, cases.SETTINGS["aligned_b32"], order, k)
    for rows_ in (8, 32, 128):
      add("batch B", rows_, cases.Setting(cases.ALIGNED, rows_), order, 1)
    for length in (50, 150, 400):
      shapes = (text, (length, audio[1]), (length, vision[1]))
      add("length of audio and vision", length, cases.Setting(shapes, 32), order, 1)
  return rows


def compare_memory(name: str = "unaligned_b128", model: str = "self_mm", k: int = 20) -> dict:
  """Temporaries of many second-order inner steps, beside those of an unrolled inner loop."""
  case = cases.prepare(model, cases.SETTINGS[name])
  step, _ = cases.compile_timed(cases.ours(case, 2, k), *case.args)
  one, _ = cases.compile_timed(cases.ours(case, 2, 1), *case.args)
  params = sum(leaf.nbytes for leaf in jax.tree.leaves(case.args[0]))
  found, naive = cases.temporaries(step), cases.make_linen_step(case, 2, k).temp_bytes
  return {
    "setting": name,
    "model": model,
    "k": k,
    "temp_bytes": found,
    "linen_temp_bytes": naive,
    "ratio": naive / found,
    "bytes_per_step": (found - cases.temporaries(one)) / (k - 1),
    "parameter_bytes": params,
  }


def draw(rows: list[dict], path: str) -> None:
  """The figure of `growth`: milliseconds an iteration."""
  table = pd.DataFrame(rows)
  table["order"] = table["order"].map(lambda n: f"{cases.ORDERS[n]} order")
  table["milliseconds"] = table["seconds"] * 1e3
  plots.lines(table, "milliseconds", path, panels="against", x="value", lines="order")


def in_mebibytes(row: dict) -> dict:
  return {
    key: f"{value / 2**20:.3g} MiB" if "bytes" in key and value is not None else value
    for key, value in row.items()
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  warnings.filterwarnings("ignore", message="TF32 acceleration|Converting a tensor")  # of torch
  jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
  processes.cores_as_devices()
  settings = ["aligned_b32"] if _QUICK.value else _SETTINGS.value
  steps = ["1"] if _QUICK.value else _STEPS.value
  also = [] if _QUICK.value else _ALSO.value
  found = {"rows": [], "grid_ratio": None, "vmap3_cost": None}

  def keep(shown=()):
    if _JSON.value:
      pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if shown:
      table = tabulate.tabulate(map(in_mebibytes, shown), headers="keys", floatfmt=".3g")
      print(table, flush=True)

  todo = [
    (setting, model, int(order), int(k))
    for setting in settings
    for model in _MODELS.value
    for order in _ORDERS.value
    for k in steps
    # a BERT takes all the time there: one system and one inner step show it
    if setting != "bert" or (model == "self_mm" and k == steps[0])
  ]
  for case in tqdm.tqdm(todo, unit="case", dynamic_ncols=True):
    found["rows"] += compare(*case)
    keep()
  keep(found["rows"])
  plain = [name for name in settings if name in ("aligned_b32", "unaligned_b128")]
  if "grid" in also:
    found["grids"] = []
    for name in plain:
      for model in _MODELS.value:
        found["grids"].append(compare_grids(name, model))
        found["grid_ratio"] = min(row["ratio"] for row in found["grids"])
        keep(found["grids"][-1:])
  if "seeds" in also:
    found["seeds"] = [
      compare_seeds(plain[0], model, order, 1) for model in _MODELS.value for order in cases.ORDERS
    ]
    found["vmap3_cost"] = max(row["cost"] for row in found["seeds"])
    keep(found["seeds"])
  if "growth" in also:
    found["growth"] = growth()
    keep(found["growth"])
    if _FIGURE.value:
      draw(found["growth"], _FIGURE.value)
  if "memory" in also:
    found["memory"] = [compare_memory()]
    keep(found["memory"])
  print(f"device: {jax.devices()[0].device_kind}; ratio = their time / ours")


if __name__ == "__main__":
  app.run(main)
