"""Does meta-sampling pay? One table of the study for one system and dataset.

python -m experiments.studies.meta_sampling --config=misa:mosi --data_dir=data \\
    --out=runs/study/misa_mosi --table=main --trials=12 --seeds=10

First every method's own numbers are searched on validation, as many random trials for each
(--trials=0: the config's; --tuned=FILE: those of another system). Then every line × seed is
trained that is not finished. With --test, and once only, the test split is read: paired tests over
the seeds, corrected after Holm, with effects and intervals. The tables:

  main       ORIG, SPL-TRN and M³S with as many outer steps, and SPL-TRN with as many gradients;
             under the training's missing rates, shifted ones, and single rates
  variants   the options of M³S, and hard masks, each beside SPL-TRN with as many gradients
  why        cosine of support and query gradients, |θ* - θ| and what it changes, along training

The built-in planted datasets (planted_low, _medium, _high: cross-modal redundancy; and
planted_emotions) are written where they are missing; their tables show the best possible predictor.
"""

import datetime
import json
import pathlib
import sys
import time

import jax
import numpy as np
import pandas as pd
from absl import flags

from mmjax import data, evaluate, planted, synthetic, train, types

from .. import build, cli, engines, interrupts, loop, processes, settings, study, workdir
from . import lines, report, search, why

_FLAGS = flags.FlagValues()
_CONFIG, _SET = cli.define_config(_FLAGS)
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the datasets.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", "", "Folder of the runs and tables.", flag_values=_FLAGS)
_TABLE = flags.DEFINE_enum(
  "table", "main", [*lines.TABLES, "why"], "Which table.", flag_values=_FLAGS
)
_LINES = flags.DEFINE_multi_string(
  "line", [], "Only this line, or these, and their rivals; all if unset.", flag_values=_FLAGS
)
_TRIALS = flags.DEFINE_integer(
  "trials", 12, "Trials of each method's search.", lower_bound=0, flag_values=_FLAGS
)
_GRADIENTS = flags.DEFINE_float(
  "gradients",
  float("inf"),
  "The most that a step of a search's trial may cost, in gradients of a batch.",
  lower_bound=2.0,
  flag_values=_FLAGS,
)
_TUNED = flags.DEFINE_string(
  "tuned", "", "A tuned.json, instead of a search of its own.", flag_values=_FLAGS
)
_SEEDS = flags.DEFINE_string("seeds", "10", cli.SEEDS_HELP, flag_values=_FLAGS)
_MASK_SEEDS = flags.DEFINE_string("mask_seeds", "3", cli.SEEDS_HELP, flag_values=_FLAGS)
_SHIFTS = flags.DEFINE_list(
  "shifts",
  ["0", "0.2-0.4", "0.6-0.8", "0.8-1"],
  "Test rates beside the training's.",
  flag_values=_FLAGS,
)
_CURVE = flags.DEFINE_string(
  "curve", "0:0.9:0.1", "Single test rates that are drawn.", flag_values=_FLAGS
)
_TEST = flags.DEFINE_bool("test", False, "Read the test split, once.", flag_values=_FLAGS)
_AGAIN = flags.DEFINE_bool("again", False, "Read it once more, and say so.", flag_values=_FLAGS)
_TIMED = flags.DEFINE_integer(
  "timed_steps", 5, "Steps that are timed of each line; 0: none.", lower_bound=0, flag_values=_FLAGS
)
study.define_schedule(_FLAGS)
engines.define(_FLAGS)
FEW = 5


def prepare(config: settings.Config, data_dir: pathlib.Path) -> planted.World | None:
  """The world of a planted dataset, whose file is written unless it is there; else None."""
  if (known := planted.DATASETS.get(config.data.name)) is None:
    return None
  world = planted.make_world(known[0], scores=known[1])
  path = data_dir / f"{config.data.name}.pkl"
  if not path.exists():
    synthetic.write_pickle(path, planted.make_arrays(world))
  return world


def conditions(config: settings.Config) -> list[evaluate.Condition]:
  """The training's rates, the shifted ones, and those of the curve; each once."""
  mask = build.test_mask(config)
  parsed = [evaluate.parse_rates(t, mask=mask) for t in (",".join(_SHIFTS.value), _CURVE.value)]
  found: dict[str, evaluate.Condition] = {}
  for one in (build.valid_condition(config), *parsed[0], *parsed[1]):
    found.setdefault(one.name, one)
  return list(found.values())


def readings(out: pathlib.Path, table: str) -> list[str]:
  """When the test split was read for a table."""
  path = out / "test_read.json"
  return (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}).get(table, [])


def check_reading(out: pathlib.Path, table: str, again: bool) -> None:
  """Raises a `UsageError` if the test split was read for a table, unless that is asked for."""
  if (times := readings(out, table)) and not again:
    raise types.UsageError(
      f"the test split was read for {table!r} on {times[-1]}; its results are in {out}. Who reads"
      " it again after having changed anything selects by it: --again does, and the tables say so."
    )


def note_reading(out: pathlib.Path, table: str) -> int:
  """Notes that the test split is read for a table; returns how often it has been by now."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  found = {one: readings(out, one) for one in lines.TABLES}
  found[table] = [*found[table], now]
  workdir.write_atomically(out / "test_read.json", json.dumps(found, indent=2) + "\n")
  return len(found[table])


def validation_rows(runs: study.Study) -> list[dict]:
  """Of every run the metrics of its selected epoch on validation."""
  rows = []
  for variant in runs.variants:
    condition = build.valid_condition(variant.config)
    for seed in runs.seeds:
      path = runs.path(variant, seed)
      (best, *_) = json.loads((path / "done.json").read_text(encoding="utf-8")).values()
      line = next(one for one in workdir.history(path) if one["epoch"] == best["epoch"])
      told = {"kind": condition.kind, "condition": condition.name, "seed": seed, "mask_seed": 0}
      rows.append({**variant.columns, **told, **line["valid"]})
  return rows


def optimum_rows(world, dataset, tested, mask_seeds, out) -> list[dict]:
  """Rows of the best predictor; `optimum.md` has its error in closed form beside the measured."""
  system = planted.optimum(world)
  run = lambda output: evaluate.make_grid(  # noqa: E731
    system, dataset.test, tested, mask_seeds, output=output
  )({}, {})
  rows = evaluate.score(dataset.spec, run("prediction"), dataset.test.label, tested, mask_seeds)
  metric = "acc" if dataset.spec.num_classes else "mae"
  best = planted.best_accuracy if metric == "acc" else planted.best_mae
  exact = best(run("variance")).mean((1, 2))
  measured = np.reshape([row[metric] for row in rows], (len(tested), -1)).mean(1)
  table = pd.DataFrame({"condition": [one.name for one in tested], "closed form": exact})
  table["on these test samples"] = measured
  text = table.to_markdown(index=False, floatfmt=".4f")
  (out / "optimum.md").write_text(f"{metric} of the optimum\n\n{text}\n", encoding="utf-8")
  told = {"method": "optimum", "split": "test", "selection": "closed form", "seed": 0}
  return [{**told, **row} for row in rows]


def seconds_of_a_step(run: build.Run, steps: int) -> float:
  """Least seconds of an outer step of the last phase, on one device: others may use it, too."""
  recipe, split = run.recipe._replace(mesh=None), run.dataset.train
  progress = train.start(recipe, split, run.dataset.spec, run.key)
  rows = min(recipe.batch_size, len(split.index)) * recipe.method.draws
  batch = jax.device_put(data.take(split, np.arange(rows) % len(split.index)))
  step, state = jax.jit(train.make_step(recipe, recipe.system.phases[-1])), progress.state
  took = []
  for _ in range(steps + 1):
    began = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch, run.key))
    took.append(time.perf_counter() - began)
  return min(took[1:])


def cost_rows(runs: study.Study, steps: int, out: pathlib.Path) -> list[dict]:
  """What each line costs: per step, and in all that its runs took."""
  path, rows = out / "seconds.json", []
  known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  base = runs.variants[0].config.train.batch_size
  for variant in runs.variants:
    cost, name = lines.cost(variant.config), variant.columns["method"]
    # lines that only train longer have the same step
    parts = (variant.config[name] for name in ("model", "data", "mask", "method"))
    step = [variant.config.train.batch_size, *map(settings.plain, parts)]
    key = json.dumps(step, sort_keys=True)
    if key not in known and steps:
      known[key] = seconds_of_a_step(runs.run(variant, runs.seeds[0]), steps)
      workdir.write_atomically(path, json.dumps(known))
    lengths = [workdir.history(runs.path(variant, seed))[-1]["step"] for seed in runs.seeds]
    taken, second = float(np.mean(lengths)), known.get(key, float("nan"))
    rows.append(
      {
        "method": name,
        "rows / step": cost.rows,
        "gradients / step": cost.equivalent / base,
        "steps": taken,
        "gradients": taken * cost.equivalent / base,
        "s / step": second,
        "s": taken * second,
      }
    )
  return rows


def explain(made, seeds, data_dir, out) -> None:
  """Trains with `why.make_measure` as an evaluator, and writes `why.csv`, `why.md`, `why.png`."""
  (like,) = (line.config for line in made if line.name == "M3S")
  rows = []
  with interrupts.Watch() as watch:
    for line in (one for one in made if one.name in ("SPL-TRN", "M3S")):
      runs = study.Study([_variant(line)], seeds, data_dir, out / "why")
      for seed in seeds:
        path, run = runs.path(runs.variants[0], seed), runs.run(runs.variants[0], seed)
        if not workdir.is_done(path):
          run = run._replace(evaluators={**run.evaluators, "why": why.make_measure(run, like)})
          try:
            loop.execute(run, path, data_dir, should_stop=lambda: watch.signal is not None)
          except interrupts.Interrupted:
            print(f"Interrupted; saved in {out}. The same command goes on from there.")
            sys.exit(128 + (watch.signal or 0))
        for one in workdir.history(path):
          told = {"method": line.name, "seed": seed, "epoch": one["epoch"]}
          rows.append({**told, **one["why"]})
  report.explanation(rows, why.NAMES, out)


def _variant(line: lines.Line) -> study.Variant:
  folder = "".join(c if c.isalnum() or c in "-._" else "_" for c in line.name.replace("×", "x"))
  return study.Variant(line.name, line.config, {"method": line.name}, folder)


@cli.binary(_FLAGS, __doc__, required=["config", "out"])
def main():
  processes.cores_as_devices()
  engine, table = engines.make(_FLAGS), str(_TABLE.value)
  schedule = str(_FLAGS["schedule"].value)
  out, data_dir = pathlib.Path(_OUT.value), pathlib.Path(_DATA_DIR.value)
  seeds, mask_seeds = (cli.seeds(f.name, f.value) for f in (_SEEDS, _MASK_SEEDS))
  config = cli.change(settings.load(_CONFIG.value), {}, cli.entries(_SET.value))
  if build.is_oracle(config) or config.train.log_test:
    raise types.UsageError("config.train.select and .log_test may not read the test split here.")
  if _TEST.value and table == "why":
    raise types.UsageError("--table=why looks at the training split alone: it has no --test.")
  conditions(config)  # what they cannot be is told before any work
  if _TEST.value:
    check_reading(out, table, _AGAIN.value)
  world = prepare(config, data_dir)
  if _TUNED.value:
    numbers = search.read(_TUNED.value)
  elif _TRIALS.value:
    numbers = search.search(
      config, _TRIALS.value, data_dir, out / "search", engine, schedule, _GRADIENTS.value
    )
  else:
    numbers = {}
  changes = {name: found["changes"] for name, found in numbers.items()}
  made = lines.TABLES["main" if table == "why" else table](config, changes)
  if table == "why":
    explain(made, seeds, data_dir, out)
    return
  made = lines.some(made, _LINES.value)
  runs = study.Study([_variant(line) for line in made], seeds, data_dir, out / "runs")
  runs.check(conditions)
  if len(seeds) < FEW:
    cli.note(f"{len(seeds)} runs per line are few: tests say little below {FEW}.")
  runs.train(schedule, engine)
  metric = build.select(config, runs.dataset(runs.variants[0]).spec)[0].partition("/")[2]
  pairs = [(line.name, rival) for line in made for rival in line.rivals]
  report.costs(cost_rows(runs, _TIMED.value, out), out, f"{table}_cost")
  valid = validation_rows(runs)
  report.means(valid, metric, out, f"{table}_valid", "Validation, which selected: no result.")
  report.comparisons(valid, pairs, metric, out, f"{table}_valid_paired")
  if not _TEST.value:
    cli.note("the test split was not read; the same command with --test does so, once.")
    return
  times = note_reading(out, table)
  rows = [row for one in runs.evaluate(conditions, mask_seeds) for row in one.rows]
  trained = build.valid_condition(config).name
  asked = {trained, *(one.name for one in evaluate.parse_rates(",".join(_SHIFTS.value)))}
  shown = [row for row in rows if row["condition"] in asked]
  if world is not None:
    tested = conditions(config)
    rows += optimum_rows(world, runs.dataset(runs.variants[0]), tested, mask_seeds, out)
  pd.DataFrame(rows).to_csv(out / f"{table}_runs.csv", index=False)
  told = f"Test; trained at {trained}; {len(seeds)} runs, {len(mask_seeds)} masks each."
  told += f" The test split was read {times} times." if times > 1 else ""
  report.means(rows, metric, out, table, told, curve=True)
  report.comparisons(shown, pairs, metric, out, f"{table}_paired")


if __name__ == "__main__":
  main()
