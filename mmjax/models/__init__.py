"""The systems by name: `MODELS[name](**settings) -> System`."""

import importlib
from typing import Any

from mmjax import registry, torch_import, types
from mmjax.models import (
  almt,
  cenet,
  corrkd,
  cubemlp,
  dmd,
  gcnet,
  hrlf,
  lmf,
  lnln,
  mctn,
  misa,
  mmim,
  mmin,
  mult,
  self_mm,
  smil,
  tetfn,
  tfn,
  tfr_net,
  transm,
)

MODELS = {
  "almt": almt.make,
  "cenet": cenet.make,
  "corrkd": corrkd.make,
  "cubemlp": cubemlp.make,
  "dmd": dmd.make,
  "gcnet": gcnet.make,
  "hrlf": hrlf.make,
  "lmf": lmf.make,
  "lnln": lnln.make,
  "mctn": mctn.make,
  "misa": misa.make,
  "mmim": mmim.make,
  "mmin": mmin.make,
  "mult": mult.make,
  "self_mm": self_mm.make,
  "smil": smil.make,
  "tetfn": tetfn.make,
  "tfn": tfn.make,
  "tfr_net": tfr_net.make,
  "transm": transm.make,
}


def make(name: str, **given: Any) -> types.System:
  """The system of a config.

  Args:
    name: registered, or "package.module:attribute".
    **given: settings.

  Raises:
    UsageError: on an unknown name or setting, or one that is missing or wrong.
  """
  factory = registry.lookup("model", MODELS, name)
  return registry.call("model", name, factory, registry.settings_of(factory), **given)


def settings(name: str) -> dict[str, Any]:
  """The settings of a model with their defaults; none of an own one that takes `**settings`.

  Args:
    name: registered, or "package.module:attribute".
  """
  return registry.settings_of(registry.lookup("model", MODELS, name)) or {}


def torch_rules(name: str, **changes: Any) -> torch_import.Rules:
  """What the names in a model's published state_dict stand for.

  They stand in the model's module: `TORCH_RULES`, or `torch_rules(settings)` where the names
  depend on its settings.

  Args:
    name: registered, or "package.module:attribute".
    **changes: settings that differ from the defaults.

  Raises:
    UsageError: if the module has none.
  """
  module = f"mmjax.models.{name}" if name in MODELS else name.partition(":")[0]
  module, known = importlib.import_module(module), settings(name)
  if hasattr(module, "torch_rules"):
    return module.torch_rules({**known, **changes})
  if hasattr(module, "TORCH_RULES"):
    return module.TORCH_RULES
  raise types.UsageError(f"model {name!r}: {module.__name__} has no TORCH_RULES to import with.")
