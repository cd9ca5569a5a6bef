"""Ablations: one system with named sets of config changes, as Tables 4-7 of the LNLN paper.

With --protocol=hrlf --model=hrlf --ablation=components: Table 3 of the HRLF paper.

python -m experiments.ablate --model=lnln --ablation=components --dataset=mosi --data_dir=data \\
    --out=runs/ablation

An ablation is an entry of ABLATIONS in the model's config file, or one of those that every
model has (`modalities`: Table 6). `--change="no decay: optimizer.weight_decay=0"` adds a line of
your own. All variants train and test under the same missing data; the tables give means over the
missing rates, the difference from the unchanged model, and p of a two-tailed t-test over seeds.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from mmjax import types

from . import cli, protocol, settings

_FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  "model", "lnln", "The system, by its config's name or file FILE.py.", flag_values=_FLAGS
)
_ABLATION = flags.DEFINE_list("ablation", [], "Names of the sets of changes.", flag_values=_FLAGS)
_CHANGE = flags.DEFINE_multi_string(
  "change", [], "NAME: ENTRY=VALUE; ENTRY=VALUE, a line more.", flag_values=_FLAGS
)
protocol.define(_FLAGS)


def changes_of(
  model: str, ablations: Sequence[str], changes: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
  """Name -> config entries of each changed line."""
  known = protocol.ablations(model)
  if ablations:
    cli.some_of("ablation", ablations, list(known))
  found = {name: change for ablation in ablations for name, change in known[ablation].items()}
  for text in changes:
    name, separator, entries = text.partition(":")
    if not separator or not name.strip():
      raise types.UsageError(f"--change={text!r}: expected NAME: ENTRY=VALUE; ENTRY=VALUE.")
    found[name.strip()] = dict(settings.parse(entry) for entry in entries.split(";"))
  if not found:
    raise types.UsageError(
      f"nothing to change: set --change, or --ablation to some of {', '.join(known)}."
    )
  return found


@cli.binary(_FLAGS, __doc__, required=["out"])
def main():
  model = _MODEL.value
  base = pathlib.Path(model).stem
  changes = {base: {}}
  changes |= {
    f"{base} {name}": change
    for name, change in changes_of(model, _ABLATION.value, _CHANGE.value).items()
  }
  asked = protocol.Asked(_FLAGS, [model])
  variants = [asked.variant(name, model, change) for name, change in changes.items()]
  asked.run("ablate", variants, baseline=base)


if __name__ == "__main__":
  main()
