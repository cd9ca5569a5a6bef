"""What the study of meta-sampling compares: methods, variants of M³S, and what costs as much."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmjax import types

from .. import build, settings

Changes = Mapping[str, Any]

TIMES = " ×"  # an entry "optimizer ×" multiplies all learning rates below "optimizer"
RATES = ("learning_rate", "peak")
LASTING = ("epochs", "patience", "teacher_epochs")  # entries that last as long as the training

# The parameters that only the head has, which ANIL adapts alone; of MMIM's other phase, all.
HEADS = {
  "misa": "^fusion_[12]/",
  "self_mm": "^post_fusion/",
  "mmim": "^(fusion|mi)_",
  "mmin": "/classifier/",
  "lnln": "^head/",
}
# Options of m3s, each a change of the plain one.
PLAIN = {"method.inner_steps": 1, "method.order": "first", "method.tasks": 1}
VARIANTS: dict[str, Changes] = {
  "second order": {"method.order": "second"},
  "K = 3": {"method.inner_steps": 3},
  "K = 5": {"method.inner_steps": 5},
  "K = 3, second order": {"method.inner_steps": 3, "method.order": "second"},
  "K = 3, fresh masks": {"method.inner_steps": 3, "method.fresh_masks": True},
  "learned inner rates": {"method.inner_rates": "learned"},
  "2 tasks": {"method.tasks": 2},
  "4 hard masks": {"method.hard_masks": 4},
}


class Line(NamedTuple):
  """A line of a table.

  Attributes:
    name: of the line.
    config: of its runs, but for the seed.
    rivals: names of the lines that it is tested against.
  """

  name: str
  config: settings.Config
  rivals: tuple[str, ...] = ()


def changed(config: settings.Config, changes: Changes) -> settings.Config:
  """A copy of a config with other entries; "SECTION ×" multiplies learning rates, see `TIMES`.

  Raises:
    UsageError: on what the config cannot have.
  """
  config = settings.from_json(settings.plain(config))
  settings.assign_all(config, {k: v for k, v in changes.items() if not k.endswith(TIMES)})
  for section in (k.removesuffix(TIMES) for k in changes if k.endswith(TIMES)):
    times = changes[section + TIMES]
    # the optimizers of phases only say what differs
    for path in (section, "phase_optimizer") if section == "optimizer" else (section,):
      _replace(config, path, RATES, lambda value, times=times: value * times)
  return config


def longer(config: settings.Config, factor: float) -> settings.Config:
  """A copy of a config that trains so many times as long, its schedules and patience too."""
  config = settings.from_json(settings.plain(config))
  for section in ("train", "model", "optimizer", "phase_optimizer"):
    # the product with 7/3 may be just above the whole number that it stands for
    _replace(config, section, LASTING, lambda value: math.ceil(value * factor - 1e-9))
  return config


def _replace(config, path, names, change) -> None:
  """Changes the numbers of these names below an entry, in place."""
  *sections, last = path.split(".")
  for section in sections:
    config = config[section]
  if last in config:
    config[last] = settings.from_json(_mapped(settings.plain(config[last]), names, change))


def _mapped(tree, names, change):
  if isinstance(tree, Mapping):
    number = lambda k, v: k in names and isinstance(v, int | float)  # noqa: E731
    return {k: change(v) if number(k, v) else _mapped(v, names, change) for k, v in tree.items()}
  return tuple(_mapped(one, names, change) for one in tree) if isinstance(tree, tuple) else tree


def cost(config: settings.Config) -> types.Cost:
  """What an outer step of a config's method costs.

  Raises:
    UsageError: if the method does not say.
  """
  found = build.make_method(config).cost
  if found is None:
    raise types.UsageError(f"the method {config.method.name!r} does not say what a step costs.")
  return found(config.train.batch_size)


def factor(config: settings.Config, like: settings.Config) -> float:
  """How many steps of a config cost as much as one of another: in gradients of rows."""
  return cost(like).equivalent / cost(config).equivalent


def matched(name: str, config: settings.Config, like: settings.Config) -> list[Line]:
  """A method with the gradients of another one: in more epochs, and in larger batches.

  The batches are as many times larger as needed, and the epochs too: as many outer steps as the
  other method has. Neither gets learning rates of its own.
  """
  times = factor(config, like)
  larger = longer(config, times)
  larger.train.batch_size = round(times * config.train.batch_size)
  return [
    Line(f"{name}, epochs × {times:.3g}", longer(config, times)),
    Line(f"{name}, batches × {times:.3g}", larger),
  ]


def main(config: settings.Config, numbers: Mapping[str, Changes]) -> list[Line]:
  """The methods, on the paper's terms (as many outer steps) and with as many gradients.

  Args:
    config: the base.
    numbers: each method's own, by its name.
  """
  made = {
    name: changed(config, {"method.name": name, **numbers.get(name, {})})
    for name in ("orig", "spl", "m3s")
  }
  equal = matched("SPL-TRN", made["spl"], made["m3s"])
  rivals = ("ORIG", "SPL-TRN", *(line.name for line in equal))
  return [
    Line("ORIG", made["orig"]),
    Line("SPL-TRN", made["spl"], ("ORIG",)),
    *equal,
    Line("M3S", made["m3s"], rivals),
  ]


def variants(config: settings.Config, numbers: Mapping[str, Changes]) -> list[Line]:
  """The options of M³S and SPL-TRN's hard masks, each beside SPL-TRN with as many gradients.

  Args:
    config: the base.
    numbers: each method's own, by its name; of M³S the rates are kept, the rest is `PLAIN`.
  """
  spl = changed(config, {"method.name": "spl", **numbers.get("spl", {})})
  plain = changed(config, {"method.name": "m3s", **numbers.get("m3s", {}), **PLAIN})
  changes: dict[str, Changes] = dict(VARIANTS)
  if config.model.name in HEADS:
    changes["inner loop on the head (ANIL)"] = {"method.inner_trains": HEADS[config.model.name]}
  if build.takes_rate(config):
    low, high = _ends(settings.plain(config.mask.rate))
    changes["lighter support"] = {"method.support_rate": (low / 2, high / 2)}
    changes["harder support"] = {"method.support_rate": ((1 + low) / 2, (1 + high) / 2)}
  found = [
    ("SPL-TRN, 4 hard masks", changed(spl, {"method.hard_masks": 4})),
    ("M3S, K = 1", plain),  # "M3S" is that of the other table, whose runs lie in the same folder
    *((f"M3S, {name}", changed(plain, change)) for name, change in changes.items()),
  ]
  equal = {f"{factor(spl, one):.3g}": matched("SPL-TRN", spl, one)[0] for _, one in found}
  return [
    Line("SPL-TRN", spl),
    *equal.values(),
    *(Line(name, one, ("SPL-TRN", equal[f"{factor(spl, one):.3g}"].name)) for name, one in found),
  ]


def _ends(rate: Any) -> tuple[float, float]:
  ends = rate if isinstance(rate, tuple) else (rate,)
  if not all(isinstance(end, int | float) for end in ends):
    raise types.UsageError(f"config.mask.rate={rate}: lighter and harder need a rate, or two.")
  return float(ends[0]), float(ends[-1])


TABLES = {"main": main, "variants": variants}


def some(lines: Sequence[Line], names: Sequence[str]) -> list[Line]:
  """The lines of these names and their rivals, in the order that they have; all without names.

  Raises:
    UsageError: on a name that no line has.
  """
  if not names:
    return list(lines)
  if left := sorted(set(names) - {line.name for line in lines}):
    there = "; ".join(line.name for line in lines)
    raise types.UsageError(f"there is no line {left[0]!r}; there are {there}.")
  kept = {*names, *(rival for line in lines if line.name in names for rival in line.rivals)}
  return [line for line in lines if line.name in kept]
