"""Names in configs: a key of a registry, or an own `package.module:attribute`.

A registry is a plain dict at the end of its module (`models.MODELS`, `masking.MASKS`,
`meta.METHODS`); nothing has to be registered to be used.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmjax import types


def lookup(kind: str, registry: Mapping[str, Any], name: str) -> Any:
  """What a name stands for.

  Args:
    kind: of the registry, for errors: "model", "mask", "method".
    registry: the registered ones.
    name: a key, or "package.module:attribute" of something importable.

  Returns:
    The registered or imported object.

  Raises:
    UsageError: if it is neither; with the nearest registered name.
  """
  if name in registry:
    return registry[name]
  module, colon, attribute = name.partition(":")
  if not colon:
    raise types.UsageError(
      f"unknown {kind} {name!r}{nearest(name, registry)}; there are {', '.join(registry)},"
      " and your own as package.module:attribute."
    )
  try:
    found = importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name is None or not module.startswith(error.name):
      raise  # it is there, but what it imports is not
    raise types.UsageError(
      f"{kind} {name!r}: there is no module {error.name!r}; is its folder in PYTHONPATH?"
    ) from None
  if not hasattr(found, attribute):
    raise types.UsageError(f"{kind} {name!r}: module {module!r} has no {attribute!r}.")
  return getattr(found, attribute)


def nearest(name: str, names: Iterable[str]) -> str:
  """The hint " (did you mean 'misa'?)" if one of the names is like it, else nothing."""
  found = difflib.get_close_matches(name, list(names), 1)
  return f" (did you mean {found[0]!r}?)" if found else ""


def settings_of(factory: Callable[..., Any]) -> dict[str, Any] | None:
  """The keyword settings that a factory takes with their defaults; None if it takes any.

  A setting without a default has `inspect.Parameter.empty`.
  """
  found = {}
  for parameter in inspect.signature(factory).parameters.values():
    if parameter.kind is parameter.VAR_KEYWORD:
      return None
    if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
      found[parameter.name] = parameter.default
  return found


def call(
  kind: str,
  name: str,
  factory: Callable[..., Any],
  taken: Mapping[str, Any] | None,
  /,
  *args: Any,
  **given: Any,
) -> Any:
  """A factory's result; settings that it refuses are the user's to mend.

  Args:
    kind, name: of the factory, for errors.
    factory: it is called with the arguments and settings that follow.
    taken: the settings that it takes, see `settings_of`.

  Raises:
    UsageError: on a setting that it does not take, lacks, or refuses.
  """
  if taken is not None:
    for setting in given:
      if setting not in taken:
        raise types.UsageError(
          f"{kind} {name!r} takes no {setting!r}{nearest(setting, taken)}; it takes"
          f" {', '.join(taken)}."
        )
    lacking = [n for n, v in taken.items() if v is inspect.Parameter.empty and n not in given]
    if lacking:
      raise types.UsageError(f"{kind} {name!r} needs the setting {lacking[0]!r}.")
  try:
    return factory(*args, **given)
  except types.UsageError:
    raise
  except ValueError as error:
    raise types.UsageError(f"{kind} {name!r}: {error}") from error
