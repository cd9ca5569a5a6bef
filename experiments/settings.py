"""Configs: finding one, changing entries of it, and its form as JSON.

A config is a whole run. Its sections `model`, `method` and `mask` name a factory (a key of a
registry, or an own `package.module:attribute`) and hold the settings of it that differ from the
factory's defaults; what they may hold is what the factory takes.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import pathlib
import types as python_types
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from mmjax import bert, data, masking, meta, models, optim, registry, stream, types

Config = Any  # an ml_collections.ConfigDict, whose entries have no types to check
CONFIGS = pathlib.Path(__file__).with_name("configs")
REGISTRIES: dict[str, Mapping[str, Any]] = {
  "model": models.MODELS,
  "method": meta.METHODS,
  "mask": masking.MASKS,
}
NEVER = {  # parameters of factories that are no settings
  "method": {"mask", "at_rate"},
  "optimizer": {"total_steps", "differentiable"},
  "data": {"arrays", "data_dir", "options"},
}


def names() -> list[str]:
  """The configs that come with the project."""
  files = sorted(path.stem for path in CONFIGS.glob("*.py"))
  return [name for name in files if name not in ("__init__", "common")]


def module_of(name: str) -> python_types.ModuleType:
  """The module of a config: "misa" of experiments/configs, or a file of your own, "my/config.py".

  Raises:
    UsageError: if there is no such file, with the nearest name.
  """
  path = pathlib.Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
  if not path.is_file():
    raise types.UsageError(
      f"there is no config {name!r}{registry.nearest(path.stem, names())}: expected one of"
      f" {', '.join(names())}, or a file FILE.py."
    )
  if path.resolve().parent == CONFIGS.resolve():
    return importlib.import_module(f"{__package__}.configs.{path.stem}")
  return read_module(path)


def read_module(path: str | pathlib.Path) -> python_types.ModuleType:
  """Runs a Python file of the user's."""
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def load(name: str, dataset: str | None = None) -> Config:
  """The config of "misa:mosi", "FILE.py:mosi", or of "misa" and a dataset."""
  name, colon, given = name.partition(":")
  dataset = given if colon else dataset
  get_config = module_of(name).get_config
  return get_config(dataset) if dataset else get_config()


def factory(config: Config, section: str) -> Any:
  """What `config[section].name` stands for, see `registry.lookup`."""
  return registry.lookup(section, REGISTRIES[section], config[section].name)


def takes(section: str, found: Any) -> dict[str, Any] | None:
  """The settings that a factory takes, with their defaults; None if it takes any."""
  known = registry.settings_of(found)
  if known is None:
    return None
  known = {name: value for name, value in known.items() if name not in NEVER.get(section, ())}
  return known | {"drop": ()} if section == "mask" else known


def known(config: Config, path: tuple[str, ...]) -> dict[str, Any] | None:
  """The entries that may stand at a path, with their defaults; None if any may."""
  if not path:
    return dict.fromkeys([*config, "phase_optimizer"])
  section, depth = path[0], len(path)
  if path[-1] == "optimizer" or (section == "phase_optimizer" and depth == 2):
    return _optimizer_takes(config, path)
  if path == ("model", "bert"):
    return dict.fromkeys(bert.SETTINGS)
  if depth > 1 or section == "phase_optimizer":
    return None
  if section in REGISTRIES:
    found = takes(section, factory(config, section))
    return found if found is None else found | {"name": ""}
  if section == "valid":
    found = takes("mask", factory(config, "mask"))
    return found if found is None else found | {"complete_share": 0.0}
  if section == "data":
    found = (takes("data", load) for load in (data.from_arrays, stream.open_dataset))
    return {k: v for taken in found for k, v in (taken or {}).items()} | {"stream": False}
  return dict(config[section])


def _optimizer_takes(config: Config, path: tuple[str, ...]) -> dict[str, Any] | None:
  """The settings of `optim.make`, and of the optimizer that an entry names."""
  named = config.optimizer if path[0] == "phase_optimizer" else {}
  for section in path:
    config = config.get(section, {})
  found = optim.OPTIMIZERS.get(config.get("name", named.get("name", "")))
  own = registry.settings_of(found) if found else None
  if own is None:
    return None
  common = inspect.signature(optim.make).parameters.values()
  listed = {p.name: p.default for p in common if p.kind is p.KEYWORD_ONLY}
  return {k: v for k, v in (own | listed).items() if k not in NEVER["optimizer"]}


def switch(config: Config, section: str, name: str) -> None:
  """Names another model, method or mask; only the settings that it takes too stay.

  Raises:
    UsageError: on an unknown name, with the nearest one.
  """
  taken = takes(section, registry.lookup(section, REGISTRIES[section], name))
  if name == config[section].name:
    return

  def kept(entries):
    return {k: v for k, v in plain(entries).items() if taken is None or k in taken}

  config[section] = ml_collections.ConfigDict({**kept(config[section]), "name": name})


def parse(text: str) -> tuple[str, str]:
  """ "train.epochs=20" -> ("train.epochs", "20")."""
  name, separator, value = text.partition("=")
  if not separator or not name:
    raise types.UsageError(f"--set={text}: expected ENTRY=VALUE, as train.epochs=20.")
  return name.strip(), value.strip()


def assign(config: Config, name: str, value: Any) -> None:
  """Sets the entry `name`, "train.epochs", to a value, or to what a text says.

  Raises:
    UsageError: on an entry that the config does not take, with the nearest one, or a value of
      another type.
  """
  *sections, last = name.split(".")
  where, path = config, ()
  for section in sections:
    _check_known(config, path, section, name)
    if section not in where:
      where[section] = ml_collections.ConfigDict()
    where, path = where[section], (*path, section)
    if not isinstance(where, ml_collections.ConfigDict):
      raise types.UsageError(f"config.{name}: config.{'.'.join(path)} has no entries.")
  allowed = _check_known(config, path, last, name)
  if last == "name" and path and path[0] in REGISTRIES and len(path) == 1:
    switch(config, path[0], str(value))
    return
  like = where[last] if last in where else allowed.get(last)
  found = _convert(name, value, plain(like))
  with where.ignore_type():
    where[last] = ml_collections.ConfigDict(found) if isinstance(found, Mapping) else found


def put(tree: Any, name: str, value: Any) -> Any:
  """A copy of a plain tree with another value, of any kind, such as a traced one.

  Args:
    tree: of `plain`.
    name: of what is there: "train.epochs"; "optimizer.groups.0.1.learning_rate" is in tuples.
    value: the value.

  Returns:
    The tree.
  """
  first, _, rest = name.partition(".")
  new = lambda old: put(old, rest, value) if rest else value  # noqa: E731
  if isinstance(tree, tuple):
    return tuple(new(old) if str(n) == first else old for n, old in enumerate(tree))
  return {**tree, first: new(tree[first])}


def assign_all(config: Config, entries: Mapping[str, Any]) -> None:
  """`assign` of several entries; names come first, since the settings are theirs."""
  for name in sorted(entries, key=lambda name: not name.endswith(".name")):
    assign(config, name, entries[name])


def _check_known(config, path, entry, name) -> dict[str, Any]:
  allowed = known(config, path)
  if allowed is None or entry in allowed:
    return allowed or {}
  where = ".".join(("config", *path))
  owner = f" of {config[path[0]].name!r}" if len(path) == 1 and path[0] in REGISTRIES else ""
  raise types.UsageError(
    f"there is no entry config.{name}{registry.nearest(entry, allowed)};"
    f" {where}{owner} has {', '.join(sorted(allowed))}."
  )


def _convert(name: str, given: Any, like: Any) -> Any:
  """A value, or the text of one, as the entry `name` that has been `like` this."""
  value: Any = given
  if isinstance(like, str):
    return str(value)
  if isinstance(value, str):
    with contextlib.suppress(ValueError, SyntaxError):
      value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
  value = plain(value)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if isinstance(like, bool):
    right, kind = isinstance(value, bool), "true or false"
  elif isinstance(like, int):
    right, kind = number and value == int(value), "a whole number"
    value = int(value) if right else value
  elif isinstance(like, float):  # a rate may be an interval, a learning rate a schedule
    right, kind = number or isinstance(value, tuple | Mapping), "a number"
    value = float(str(value)) if number else value
  elif isinstance(like, tuple):
    right = isinstance(value, tuple) or number or (isinstance(value, str) and value != "")
    kind = "a list, as 1,2"
    value = value if isinstance(value, tuple) or name.endswith("rate") else (value,)
  elif isinstance(like, Mapping):
    right, kind = isinstance(value, Mapping), "entries of its own"
  else:
    return value
  if not right:
    raise types.UsageError(f"config.{name}={value}: expected {kind}, as {like!r}.")
  return value


def check(config: Config) -> None:
  """Raises a `UsageError` on values that no run can have."""
  for name, least in (("batch_size", 1), ("epochs", 1), ("patience", 0)):
    if (value := config.train[name]) < least:
      raise types.UsageError(f"config.train.{name}={value}: expected at least {least}.")
  if config.seed < 0:
    raise types.UsageError(f"config.seed={config.seed}: expected at least 0.")
  for name in (f"{part}.rate" for part in ("mask", "valid") if "rate" in config[part]):
    rate = config[name.split(".")[0]].rate
    ends = rate if isinstance(rate, tuple) else (rate,)
    numbers = all(isinstance(end, int | float) for end in ends)
    if numbers and not (len(ends) in (1, 2) and 0 <= ends[0] <= ends[-1] <= 1):
      raise types.UsageError(f"config.{name}={rate}: expected 0 <= LOW <= HIGH <= 1, as 0.4,0.6.")


def plain(tree: Any) -> Any:
  """A config, or a part of one, as dicts, tuples and values: the one form of them."""
  if isinstance(tree, Mapping | ml_collections.ConfigDict):
    return {str(key): plain(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return tuple(plain(value) for value in tree)
  return tree


def from_json(tree: Mapping[str, Any]) -> Config:
  """The config that was written as JSON, where every tuple is a list."""
  return ml_collections.ConfigDict(plain(tree))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"train": {"epochs": 3}} -> {"train.epochs": 3}."""
  flat = {}
  for key, value in tree.items():
    nested = isinstance(value, Mapping) and value
    flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
  return flat


def lines(config: Config) -> Iterable[str]:
  """The entries of a config and the settings that it leaves at their defaults, for --help."""
  found = flatten(plain(config))
  for section in REGISTRIES:
    taken = takes(section, factory(config, section)) or {}
    found |= {
      f"{section}.{name}": value
      for name, value in taken.items()
      if not any(key.startswith(f"{section}.{name}") for key in found)
    }
  for name in sorted(found):
    value = found[name]
    yield f"--config.{name}={'(needed)' if value is inspect.Parameter.empty else value}"
