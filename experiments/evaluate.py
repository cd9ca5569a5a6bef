"""Evaluates a trained run under missing data: a table and curves.

python -m experiments.evaluate --workdir=runs/misa-m3s --rates=0:0.9:0.1 --mask_seeds=3 \
    --missing=l,a,v,la,lv,av
"""

import pathlib
import sys

from absl import app, flags

from experiments import jobs, report
from experiments import run as run_lib
from mmjax import evaluate

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets, if it has moved.")
_RATES = flags.DEFINE_string(
  "rates", "0:0.9:0.1", "Missing rates: first:last:step, a list 0,0.5, or intervals 0.4-0.6."
)
_MISSING = flags.DEFINE_list("missing", [], "Sets of missing modalities: l,a,v,la,lv,av.")
_MASK_SEEDS = flags.DEFINE_integer("mask_seeds", 3, "Number of mask seeds.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "test", ("train", "valid", "test"), "Split to evaluate.")
_MASK = flags.DEFINE_enum("mask", None, ("span", "bernoulli"), "Kind of mask; the run's if unset.")
_OUT = flags.DEFINE_string("out", None, "Output folder; WORKDIR/robustness by default.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  jobs.cores_as_devices()
  try:
    conditions = evaluate.parse_rates(_RATES.value)
    conditions += [evaluate.missing_condition(letters) for letters in _MISSING.value]
    run, best = run_lib.load_run(_WORKDIR.value, _DATA_DIR.value)
    if _MASK.value:
      run.config.mask.kind = _MASK.value
    rows = evaluate.robustness(
      run.recipe.system,
      best["params"],
      best["extra"],
      getattr(run.dataset, _SPLIT.value),
      run.dataset.spec,
      conditions,
      range(_MASK_SEEDS.value),
      mask_of=run_lib.make_mask_of(run.config),
    )
  except ValueError as error:
    sys.exit(f"error: {error}")
  out = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / "robustness")
  report.robustness(rows, out)


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir"])
  app.run(main)
