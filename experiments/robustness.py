"""Robust evaluation of many systems under the same missing data: the LNLN paper's protocol.

python -m experiments.robustness --configs=lnln,almt,misa --dataset=mosi --data_dir=data \\
    --out=runs/robust --seeds=1111,1112,1113 --conditions=rates,modalities

Trains what is not finished yet, under the same kind of training masks for all, and evaluates
missing rates 0.0-0.9 and the six sets of missing modalities. Every model sees the same missing
data: masks depend on the condition, the mask seed and the sample alone. Writes tables with the
paper's values beside ours, curves, confusion matrices, a "laziness" figure, a 2-D view of the
representations, and `report.html` with all of it.
"""

from absl import app, flags

from experiments import robust
from mmjax import models

_CONFIGS = flags.DEFINE_list("configs", list(models.MODELS), "Systems, by their config's name.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  robust.main("robustness", [robust.Variant(name, name, {}) for name in _CONFIGS.value])


if __name__ == "__main__":
  app.run(main)
