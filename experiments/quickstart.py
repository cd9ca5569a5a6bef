"""The whole way of one user on built-in data, in a few minutes on a laptop.

python -m experiments.quickstart

Writes an MMSA pickle of synthetic data, converts it, trains MISA with ORIG, SPL-TRN and
M³S at a missing rate of 0.4-0.6, and compares the three at every missing rate.
"""

import pathlib
import sys
import time

from absl import app, flags

from data_prep import convert
from experiments import report
from experiments import run as run_lib
from experiments import workdir as workdir_lib
from experiments.configs import quickstart as quickstart_config
from mmjax import evaluate, synthetic

_OUT = flags.DEFINE_string("out", "runs/quickstart", "Output folder.")
_EPOCHS = flags.DEFINE_integer("epochs", None, "Epochs of each training.", lower_bound=1)

MISSING_RATE = (0.4, 0.6)


def prepare(out: pathlib.Path) -> None:
  """Writes the synthetic pickle and converts it, unless that was done before."""
  pickle = out / "synthetic.pkl"
  if not pickle.exists():
    synthetic.write_pickle(pickle, synthetic.make_arrays(seed=0))
  if not (out / "data" / "synthetic").exists():
    convert.convert(pickle, "synthetic", out / "data")


def train_and_test(method: str, out: pathlib.Path, epochs: int | None) -> list[dict]:
  """Trains one method, from wherever its folder stands; returns its robustness rows."""
  config = quickstart_config.get_config()
  config.train.epochs = epochs or config.train.epochs
  asked = {"config": config.to_dict(), "method": method, "missing_rate": MISSING_RATE, "seed": 0}
  dataset = run_lib.load_data(config, out / "data")
  run = run_lib.make_run(config, dataset, method=method, missing_rate=MISSING_RATE, seed=0)
  folder = workdir_lib.Workdir(out / method, asked, data_dir=out / "data")
  best = run_lib.execute(run, folder).best
  folder.close()
  rows = evaluate.robustness(
    run.recipe.system,
    best["params"],
    best["extra"],
    dataset.test,
    dataset.spec,
    evaluate.parse_rates("0:0.9:0.1"),
    range(3),
    mask_of=run_lib.make_mask_of(config),
  )
  return [{"method": run_lib.METHODS[method], **row} for row in rows]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  began, out = time.monotonic(), pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  prepare(out)
  rows = []
  for method in run_lib.METHODS:
    print(f"\nTraining MISA with {run_lib.METHODS[method]} ({out / method}):", flush=True)
    try:
      rows += train_and_test(method, out, _EPOCHS.value)
    except workdir_lib.WorkdirError as error:
      sys.exit(f"error: {error}")
  print()
  table = report.robustness(rows, out, by=("method", "kind", "condition"), lines="method")
  mean = table.groupby("method", sort=False)["mae"].mean()
  print(
    "\nMAE averaged over all missing rates: "
    + ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
    + f".\nDone in {time.monotonic() - began:.0f} s. Next, with a feature pickle of your own:\n"
    "  python -m data_prep.convert --pickle=unaligned_50.pkl --dataset=mosi --data_dir=data\n"
    "  python -m experiments.train --config=experiments/configs/misa.py:mosi --data_dir=data \\\n"
    "      --workdir=runs/misa-m3s --method=m3s --missing_rate=0.4,0.6\n"
    "  python -m experiments.evaluate --workdir=runs/misa-m3s"
  )


if __name__ == "__main__":
  app.run(main)
