"""Robust evaluation of many systems under the same missing data: the LNLN paper's protocol.

python -m experiments.robustness --configs=lnln,almt,misa --dataset=mosi --data_dir=data \\
    --out=runs/robust --seeds=1111,1112,1113 --conditions=rates,modalities

Trains what is not finished yet, under the same kind of training masks for all, and evaluates
missing rates 0.0-0.9 and the six sets of missing modalities. Every model sees the same missing
data: masks depend on the condition, the mask seed and the sample alone. Writes tables with the
paper's values beside ours, curves, confusion matrices, a "laziness" figure, a 2-D view of the
representations, and `report.html` with all of it.
"""

import pathlib

from absl import flags

from mmjax import models

from . import cli, protocol

_FLAGS = flags.FlagValues()
_CONFIGS = flags.DEFINE_list(
  "configs",
  list(models.MODELS),
  "Systems, by their config's name or file FILE.py.",
  flag_values=_FLAGS,
)
protocol.define(_FLAGS)


@cli.binary(_FLAGS, __doc__, required=["out", "configs"])
def main():
  names = {pathlib.Path(config).stem: config for config in _CONFIGS.value}
  asked = protocol.Protocol(_FLAGS, _CONFIGS.value)
  asked.run("robustness", [asked.variant(name, config, {}) for name, config in names.items()])


if __name__ == "__main__":
  main()
