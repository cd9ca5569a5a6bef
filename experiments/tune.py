"""Searches the settings of a system: many trials, chosen by the validation split alone.

python -m experiments.tune --config=misa:mosi --data_dir=data --out=runs/tune \\
    --space=experiments/spaces/m3s.py --trials=50

Each trial is a run folder, OUT/trials/NUMBER. The same command goes on after any interruption.
Workers on many machines share one search: the same command on each, with the same --out on a
common file system and --storage=postgresql://USER:PASSWORD@HOST/DATABASE; when one dies, the others
go on with its trials. Writes best.py (`train --config=OUT/best.py`), trials.csv, history.png and
importance.png.
"""

import importlib.util
import pathlib
import sys

from absl import flags

from mmjax import types

from . import cli, engines, interrupts, settings

_FLAGS = flags.FlagValues()
_CONFIG, _SET = cli.define_config(_FLAGS)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", "data", "Folder of the converted datasets.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "Folder of the trials and results.", flag_values=_FLAGS)
_METHOD = flags.DEFINE_string("method", None, cli.METHOD_HELP, flag_values=_FLAGS)
_MISSING_RATE = flags.DEFINE_string("missing_rate", None, cli.RATE_HELP, flag_values=_FLAGS)
_SPACE = flags.DEFINE_string(
  "space",
  "",
  "Python file with SPACE = {config entry: distribution of Optuna's}, or m3s.",
  flag_values=_FLAGS,
)
_TRIALS = flags.DEFINE_integer(
  "trials", 50, "How many, of all workers together.", lower_bound=1, flag_values=_FLAGS
)
_STORAGE = flags.DEFINE_string(
  "storage", "", "Database; SQLite in --out if unset.", flag_values=_FLAGS
)
_STUDY = flags.DEFINE_string(
  "study", "", "Name in the database; that of --out's folder if unset.", flag_values=_FLAGS
)
_PRUNER = flags.DEFINE_enum(
  "pruner",
  "median",
  ["median", "none"],
  "median: a trial ends early when its best epoch so far is worse than the median there.",
  flag_values=_FLAGS,
)
_WARMUP = flags.DEFINE_integer(
  "warmup", 5, "Epochs in which nothing is pruned.", lower_bound=0, flag_values=_FLAGS
)
_GRACE = flags.DEFINE_integer(
  "grace",
  60,
  "Seconds without a heartbeat after which a worker is taken for dead.",
  lower_bound=3,
  flag_values=_FLAGS,
)
engines.define(_FLAGS)
TOLD = "Stopping the trials after this stretch of steps"


@cli.binary(_FLAGS, __doc__, required=["config", "out", "space"])
def main():
  if importlib.util.find_spec("optuna") is None:
    raise types.UsageError("tuning needs Optuna: pip install 'mmjax[tune]'.")
  import jax
  import optuna

  from . import search, space, trials

  jax.config.update("jax_platforms", "cpu")  # here; accelerators are the trainings'
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  engine, out, sets = engines.make(_FLAGS), pathlib.Path(_OUT.value), cli.entries(_SET.value)
  short = {
    "method.name": _METHOD.value,
    "mask.rate": cli.rate("missing_rate", _MISSING_RATE.value),
  }
  config = cli.change(settings.load(_CONFIG.value), short, sets)
  entries = space.load(_SPACE.value)
  asked = search.Search(config, entries, _TRIALS.value, _DATA_DIR.value, out)
  given = {name: value for name, value in short.items() if value is not None}
  asked.check({**given, **sets})
  out.mkdir(parents=True, exist_ok=True)
  pruner = optuna.pruners.NopPruner()
  if _PRUNER.value == "median":
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=_WARMUP.value)
  opened = trials.open_study(
    _STORAGE.value or f"sqlite:///{out.absolute() / 'study.db'}",
    _STUDY.value or out.absolute().name,
    asked.better,
    pruner,
    _GRACE.value,
  )
  with opened as (study, storage), interrupts.Watch(TOLD) as watch:
    trials.agree(study, asked.describe())
    queue = trials.Queue(study, storage, entries, _TRIALS.value, config.seed, _GRACE.value)
    try:
      queue.recover()  # what a signal stopped
      asked.work(queue, engine, watch)
    except interrupts.Interrupted:
      print(f"Interrupted; saved in {out}. The same command goes on from there.")
      sys.exit(128 + (watch.signal or 0))
    asked.write(study)
    best = search.best_of(study)
  if best is None:
    raise types.UsageError(f"no trial came to its end; see {out / 'trials.csv'}.")
  told = ", ".join(f"{name}={value}" for name, value in best.params.items())
  print(f"Best of {_TRIALS.value} trials: {asked.metric} = {best.value:.4f} with {told}. Next:")
  print(cli.told(f"  python -m experiments.train --config={out / 'best.py'} --workdir=…"))


if __name__ == "__main__":
  main()
