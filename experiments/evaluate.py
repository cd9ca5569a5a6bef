"""Evaluates a trained run under missing data: a table and curves.

python -m experiments.evaluate --workdir=runs/misa-m3s --rates=0:0.9:0.1 --mask_seeds=3 \\
    --missing=l,a,v,la,lv,av
"""

import pathlib

from absl import flags

from mmjax import evaluate, masking, runs

from . import build, cli, processes, samples, settings, workdir
from .report import rates

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a training run.", flag_values=_FLAGS)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of the datasets, if it has moved.", flag_values=_FLAGS
)
_RATES = flags.DEFINE_string("rates", "0:0.9:0.1", evaluate.RATES, flag_values=_FLAGS)
_MISSING = flags.DEFINE_list(
  "missing", [], "Sets of missing modalities: l,a,v,la,lv,av.", flag_values=_FLAGS
)
_MASK_SEEDS = flags.DEFINE_string("mask_seeds", "3", cli.SEEDS_HELP, flag_values=_FLAGS)
_SPLIT = flags.DEFINE_enum(
  "split", "test", ("train", "valid", "test"), "Split to evaluate.", flag_values=_FLAGS
)
_MASK = flags.DEFINE_string(
  "mask", None, "Kind of mask, as span or bernoulli; the run's if unset.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
  "out", None, "Output folder; WORKDIR/robustness by default.", flag_values=_FLAGS
)

_PREDICTIONS = flags.DEFINE_string(
  "predictions",
  None,
  "Also keep what is predicted of each sample, condition and mask seed: a .csv or .npz.",
  flag_values=_FLAGS,
)


@cli.binary(_FLAGS, __doc__, required=["workdir"])
def main():
  processes.cores_as_devices()
  if _PREDICTIONS.value:
    samples.check("predictions", _PREDICTIONS.value, [".csv", ".npz"])
  mask_seeds = cli.seeds("mask_seeds", _MASK_SEEDS.value)
  config = settings.from_json(runs.read_config(_WORKDIR.value)["run"]["config"])
  if _MASK.value:
    settings.switch(config, "mask", _MASK.value)
  mask = build.test_mask(config)
  conditions = evaluate.parse_rates(_RATES.value, mask=mask)
  conditions += [evaluate.missing_condition(letters, mask=mask) for letters in _MISSING.value]
  run, selected = build.load_run(_WORKDIR.value, _DATA_DIR.value)
  best = selected[run.recipe.select[0]]
  if not workdir.is_done(_WORKDIR.value):
    done = len(workdir.history(_WORKDIR.value))
    cli.note(
      f"this training is not finished (epoch {done} of {config.train.epochs}); its best epoch so"
      f" far is {int(best.epoch)}."
    )
  if build.is_oracle(run.config):
    cli.note(f"TEST ORACLE: the epoch was picked by {run.recipe.select[0]}; this is no estimate.")
  split = getattr(run.dataset, _SPLIT.value)
  split = split.read() if hasattr(split, "read") else split  # a stream's
  grid = evaluate.make_grid(run.recipe.system, split, conditions, mask_seeds)
  predictions = grid(best.params, best.extra)
  if _PREDICTIONS.value:
    ids, classes = run.dataset.ids[_SPLIT.value], build.reading(run).classes
    args = (predictions, conditions, mask_seeds, ids, split.label, classes)
    samples.write_grid(_PREDICTIONS.value, *args)
    print(f"Predictions: {_PREDICTIONS.value}")
  rows = evaluate.score(run.dataset.spec, predictions, split.label, conditions, mask_seeds)
  selection = build.selection(run.config, run.dataset.spec)
  told = {"split": _SPLIT.value, "selection": selection}
  out = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / "robustness")
  test = build.test_settings(config)
  rates.write(
    [{**told, **row} for row in rows],
    out,
    by=("split", "selection", "kind", "condition"),
    quantity=masking.quantity(test["name"]),
  )
  rates.missing(evaluate.count_missing(split, conditions, mask_seeds), out, [test])


if __name__ == "__main__":
  main()
