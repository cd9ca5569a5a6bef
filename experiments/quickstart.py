"""The whole way of one user on built-in data, in a few minutes on a laptop.

python -m experiments.quickstart

Writes an MMSA pickle of synthetic data, trains MISA with ORIG, SPL-TRN and M³S at a missing rate
of 0.4-0.6, and compares the three at every missing rate.
"""

import pathlib
import sys
import time
from typing import Any

from absl import flags

from mmjax import evaluate, meta, synthetic

from . import build, cli, interrupts, loop, settings
from .report import rates

_FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string("out", "runs/quickstart", "Output folder.", flag_values=_FLAGS)
_EPOCHS = flags.DEFINE_integer(
  "epochs", None, "Epochs of each training.", lower_bound=1, flag_values=_FLAGS
)
NEXT = """Next, with a feature pickle of your own as data/mosi.pkl:
  python -m experiments.train --config=misa:mosi --data_dir=data --workdir=runs/misa-m3s \\
      --method=m3s --missing_rate=0.4,0.6
  python -m experiments.evaluate --workdir=runs/misa-m3s"""


def prepare(out: pathlib.Path) -> None:
  """Writes the synthetic pickle, unless that was done before."""
  pickle = out / "data" / "synthetic.pkl"
  if not pickle.exists():
    synthetic.write_pickle(pickle, synthetic.make_arrays(seed=0))


def train_and_test(config: settings.Config, out: pathlib.Path, watch: interrupts.Watch):
  """Trains one method, from wherever its folder stands; returns its robustness rows."""
  method, name = config.method.name, build.title(config)
  print(f"\nTraining MISA with {name} ({out / method}):", flush=True)
  dataset = build.load_data(config, out / "data")
  run = build.make_run(config, dataset)
  progress = loop.execute(
    run, out / method, out / "data", should_stop=lambda: watch.signal is not None
  )
  best = progress.best[run.recipe.select[0]]
  rows = evaluate.robustness(
    run.recipe.system,
    best.params,
    best.extra,
    dataset.test,
    dataset.spec,
    evaluate.parse_rates("0:0.9:0.1", mask=build.test_mask(config)),
    range(3),
  )
  return [{"method": name, **row} for row in rows]


@cli.binary(_FLAGS, __doc__)
def main():
  began, out = time.monotonic(), pathlib.Path(_OUT.value)
  prepare(out)
  rows = []
  with interrupts.Watch() as watch:
    try:
      for method in meta.METHODS:
        config = settings.load("quickstart:synthetic")
        config.train.epochs = _EPOCHS.value or config.train.epochs
        settings.switch(config, "method", method)
        rows += train_and_test(config, out, watch)
    except interrupts.Interrupted:
      print(f"Interrupted; saved in {out}. The same command goes on from there.")
      sys.exit(128 + (watch.signal or 0))
  print()
  table = rates.write(rows, out, by=("method", "kind", "condition"), lines="method")
  mean: Any = table.groupby("method", sort=False)["mae"].mean()
  means = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
  print(f"\nMAE averaged over all missing rates: {means}.")
  print(f"Done in {time.monotonic() - began:.0f} s. {cli.told(NEXT)}")


if __name__ == "__main__":
  main()
