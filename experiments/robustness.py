"""Robust evaluation of many systems under the same missing data, by a paper's protocol.

python -m experiments.robustness --configs=lnln,almt,misa --dataset=mosi --data_dir=data \\
    --out=runs/robust --seeds=1111,1112,1113 --conditions=rates,modalities
python -m experiments.robustness --protocol=hrlf --configs=hrlf,corrkd,transm --dataset=mosi \\
    --data_dir=data --out=runs/hrlf --baseline=corrkd --ablation=components

Trains what is not finished yet, under the same kind of training masks for all, and evaluates what
the protocol tests: missing rates and sets of missing modalities. Every model sees the same missing
data: masks depend on the condition, the mask seed and the sample alone. Writes tables with the
paper's values beside ours, the constant answer beside the systems and t-tests against a baseline,
what exactly was missing, curves, confusion matrices, a "laziness" figure, a 2-D view of the
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
_ABLATION = flags.DEFINE_list(
  "ablation",
  [],
  "Sets of changes, as `ablate` has them, of the systems that have them; further lines.",
  flag_values=_FLAGS,
)
protocol.define(_FLAGS)


def variants_of(asked: protocol.Asked, configs: list[str], ablations: list[str]):
  """A line for each system, and after it those of its ablations."""
  known = {config: protocol.ablations(config) for config in configs}
  if ablations:
    cli.some_of("ablation", ablations, [name for own in known.values() for name in own])
  found = []
  for config, own in known.items():
    name = pathlib.Path(config).stem
    found.append(asked.variant(name, config, {}))
    for changes in (own[ablation] for ablation in ablations if ablation in own):
      found += [asked.variant(f"{name} {line}", config, c) for line, c in changes.items()]
  return found


@cli.binary(_FLAGS, __doc__, required=["out", "configs"])
def main():
  asked = protocol.Asked(_FLAGS, _CONFIGS.value)
  variants = variants_of(asked, _CONFIGS.value, _ABLATION.value)
  asked.run("robustness", variants)


if __name__ == "__main__":
  main()
