"""Ablations: one system with named sets of config changes, as Tables 4-7 of the LNLN paper.

python -m experiments.ablate --model=lnln --ablation=components --dataset=mosi --data_dir=data \\
    --out=runs/ablation

An ablation is an entry of ABLATIONS in the model's config file, or one of those that every
model has (`modalities`: Table 6). `--change="no decay: optimizer.weight_decay=0"` adds a line of
your own. All variants train and test under the same missing data; the tables give means over the
missing rates, the difference from the unchanged model, and p of a two-tailed t-test over seeds.
"""

import sys

from absl import app, flags

from experiments import robust
from experiments.configs import common

_MODEL = flags.DEFINE_string("model", "lnln", "The system, by its config's name.")
_ABLATION = flags.DEFINE_list("ablation", [], "Names of the sets of changes.")
_CHANGE = flags.DEFINE_multi_string("change", [], "NAME: ENTRY=VALUE; ENTRY=VALUE, a line more.")


def make_variants(model: str, ablations: list[str], changes: list[str]) -> list[robust.Variant]:
  """The unchanged model and its variants, each named once."""
  known = common.ABLATIONS | getattr(robust.config_module(model), "ABLATIONS", {})
  if unknown := set(ablations) - known.keys():
    raise ValueError(f"{model} has no ablation {sorted(unknown)}, expected some of {list(known)}.")
  found = {name: change for ablation in ablations for name, change in known[ablation].items()}
  for text in changes:
    name, separator, entries = text.partition(":")
    if not separator:
      raise ValueError(f"--change={text!r}: expected NAME: ENTRY=VALUE; ENTRY=VALUE.")
    found[name.strip()] = dict(robust.parse_change(e.strip()) for e in entries.split(";"))
  if not found:
    raise ValueError(f"nothing to change: set --change, or --ablation to some of {list(known)}.")
  variants = [robust.Variant(f"{model} {name}", model, change) for name, change in found.items()]
  return [robust.Variant(model, model, {}), *variants]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    variants = make_variants(_MODEL.value, _ABLATION.value, _CHANGE.value)
  except ValueError as error:
    sys.exit(f"error: {error}")
  robust.main("ablate", variants, baseline=_MODEL.value)


if __name__ == "__main__":
  app.run(main)
