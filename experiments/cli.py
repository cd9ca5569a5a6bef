"""What all binaries share: their flags, `--help`, and `error: …` for what a user can mend."""

import functools
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging
from absl.testing import flagsaver

from mmjax import registry, types

from . import settings

METHOD_HELP = "Training method: orig, spl, m3s, or your own package.module:attribute."
RATE_HELP = "Missing rate in training and validation: one, or LOW,HIGH, as 0.4,0.6."
SEEDS_HELP = "How many, `5` for 0-4, or which, `1111,1112`; a single one is `1111,`."


def told(text: str) -> str:
  """A text that names binaries, `python -m experiments.train`: installed, that is `mmjax-train`."""
  if __package__ == "experiments":  # in the repository
    return text

  def command(found: re.Match[str]) -> str:
    name = "prepare" if found[1] == "convert" else found[1].replace("_", "-")
    return f"mmjax-{name}"

  text = re.sub(r"python -m (?:experiments|data_prep)\.(\w+)\b(?!\.\w)", command, text)
  return text.replace("python -m experiments.", f"python -m {__package__}.")  # a study's


def binary(flag_values: flags.FlagValues, doc: str | None, *, required: Sequence[str] = ()):
  """Makes `main()` a binary: `main(argv)` parses the flags, runs it, and exits on an error.

  Args:
    flag_values: the binary's flags.
    doc: its description, for `--help`.
    required: names of flags that must be given.

  Returns:
    The decorator. Only a `UsageError` becomes `error: …` and exit code 1; a bug keeps its
    traceback.
  """
  if "help" not in flag_values:
    flags.DEFINE_bool("help", False, "Show this.", flag_values=flag_values)
    flags.DEFINE_integer(
      "verbosity", -1, "Of the log: -1 warnings, 0 information.", flag_values=flag_values
    )

  def decorate(main: Callable[[], None]):
    @functools.wraps(main)
    def call(argv: Sequence[str] | None = None) -> None:
      saved = flagsaver.save_flag_values(flag_values)
      if argv is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # of package.module:attribute, as with `python -m`
      try:
        _parse(flag_values, list(sys.argv[1:] if argv is None else argv))
        if flag_values["help"].value:
          print(told(_help(flag_values, doc or "", required)))
          return
        for name in required:
          if flag_values[name].value in (None, [], ""):
            raise types.UsageError(f"--{name} is missing: {flag_values[name].help}")
        main()
      except types.UsageError as error:
        sys.exit(told(f"error: {error}"))
      except KeyboardInterrupt:
        print("Aborted.", file=sys.stderr)
        sys.exit(130)
      finally:
        flagsaver.restore_flag_values(saved, flag_values)

    return call

  return decorate


def _parse(flag_values: flags.FlagValues, argv: list[str]) -> None:
  """Parses the flags; `--config.a.b=VALUE` is another way to write `--set=a.b=VALUE`."""
  written, rest = [], list(argv)
  while rest:
    arg = rest.pop(0)
    if arg.lstrip("-").startswith("config.") and arg.startswith("-") and "set" in flag_values:
      entry = arg.lstrip("-").removeprefix("config.")
      if "=" not in entry and rest:
        entry += f"={rest.pop(0)}"
      arg = f"--set={entry}"
    written.append(arg)
  try:
    left = flag_values(["", *written])
  except flags.UnrecognizedFlagError as error:
    # the names with their dashes, as they are written
    near = registry.nearest(error.flagname.partition("=")[0], list(flag_values))
    raise types.UsageError(f"there is no flag --{error.flagname}{near}; see --help.") from None
  except flags.Error as error:
    raise types.UsageError(f"{str(error).rstrip('.')}. {_format_of(flag_values, error)}") from None
  if len(left) > 1:
    raise types.UsageError(f"unexpected arguments: {shlex.join(left[1:])}; see --help.")
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # libraries read theirs
  logging.set_verbosity(flag_values["verbosity"].value or 0)


def _format_of(flag_values, error) -> str:
  named = [name for name in flag_values if f"--{name}=" in str(error)]
  return flag_values[named[0]].help if named else "See --help."


def _help(flag_values, doc, required) -> str:
  parts = [doc.strip(), "\nFlags:"]
  for name in sorted(flag_values):
    flag = flag_values[name]
    default = "" if flag.default in (None, [], "") else f" (default: {flag.default_as_str})"
    needed = " (required)" if name in required else ""
    text = f"--{name}: {flag.help}{needed}{default}"
    parts.append(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="      "))
  if "set" in flag_values:
    named = [flag_values[n].value for n in ("config", "model") if n in flag_values]
    name = next((name for name in named if name), "misa:mosi")
    parts.append(f"\nEntries of the config, here of {name}, with their values:")
    parts += [f"  {line}" for line in settings.lines(settings.load(name))]
  return "\n".join(parts)


def define_config(
  flag_values: flags.FlagValues,
) -> tuple[flags.FlagHolder[str], flags.FlagHolder[list[str]]]:
  """The flags by which a binary is given a config: `--config`, and `--set` for its entries."""
  config = flags.DEFINE_string(
    "config",
    "",
    "Config and dataset, `misa:mosi` or `FILE.py:mosi`; --config.ENTRY=VALUE changes an entry.",
    flag_values=flag_values,
  )
  text = "Config entry, train.epochs=9; the same as --config.train.epochs=9."
  return config, define_set(flag_values, text)


def define_set(flag_values: flags.FlagValues, text: str) -> flags.FlagHolder[list[str]]:
  """`--set`, which may be given several times."""
  return flags.DEFINE_multi_string("set", [], text, flag_values=flag_values)


def entries(texts: Sequence[str]) -> dict[str, str]:
  """`--set` flags -> {entry: text}; the last one of an entry counts."""
  return dict(settings.parse(text) for text in texts)


def change(
  config: settings.Config, short: dict[str, object], sets: dict[str, str]
) -> settings.Config:
  """Sets the entries that short forms (`--method`, `--seed` …) and `--set` ask for.

  Args:
    config: it is changed.
    short: entry -> value; those that are None were not given.
    sets: entry -> text.

  Raises:
    UsageError: where the two contradict each other, or on an entry that does not exist.
  """
  given = {name: value for name, value in short.items() if value is not None}
  settings.assign_all(config, given)
  before = {name: _entry(config, name) for name in given}
  settings.assign_all(config, sets)
  for name, value in before.items():
    if _entry(config, name) != value:
      raise types.UsageError(
        f"config.{name} is {value!r} by its own flag and {sets.get(name)!r} by --set or --config."
      )
  settings.check(config)
  return config


def _entry(config, name):
  return settings.flatten(settings.plain(config)).get(name)


def rate(flag: str, text: str | None) -> tuple[float, float] | None:
  """ "0.4,0.6" -> (0.4, 0.6); a single rate is an interval of its own; None stays."""
  if text is None:
    return None
  try:
    low, *high = (float(number) for number in text.split(","))
    low, high = low, *(high or [low])
  except ValueError:
    raise types.UsageError(f"--{flag}={text}: expected a rate or LOW,HIGH, as 0.4,0.6.") from None
  if not 0 <= low <= high <= 1:
    raise types.UsageError(f"--{flag}={text}: expected 0 <= LOW <= HIGH <= 1, as 0.4,0.6.")
  return low, high


def rate_text(given: object) -> str:
  """(0.4, 0.6) -> "0.4,0.6", a single rate "0.5"; anything else as Python writes it."""
  ends = given if isinstance(given, tuple) else (given,)
  if not all(isinstance(end, int | float) for end in ends):
    return str(given)
  return ",".join(f"{end:g}" for end in dict.fromkeys(ends))


def seeds(flag: str, text: str) -> list[int]:
  """ "5" -> [0, 1, 2, 3, 4]; "1111,1112" -> [1111, 1112]; "1111," -> [1111].

  Raises:
    UsageError: on anything else, none at all, or the same twice.
  """
  try:
    numbers = [int(number) for number in text.split(",") if number.strip() or "," not in text]
  except ValueError:
    numbers = []
  found = numbers if "," in text else list(range(*numbers[:1])) if numbers else []
  if not found or min(found) < 0 or len(set(found)) < len(found):
    raise types.UsageError(f"--{flag}={text}: {SEEDS_HELP}")
  return found


def some_of(flag: str, values: Sequence[str], names: Sequence[str]) -> list[str]:
  """A list flag whose values must be among some names.

  Raises:
    UsageError: on another one, with the nearest name, or on none at all.
  """
  for value in values:
    if value not in names:
      near = registry.nearest(value, names)
      raise types.UsageError(f"--{flag}: unknown {value!r}{near}; expected {', '.join(names)}.")
  if not values:
    raise types.UsageError(f"--{flag} is empty; expected some of {', '.join(names)}.")
  return list(values)


def lookup_all(flag: str, section: str, names: Sequence[str]) -> dict[str, Any]:
  """What the names of a list flag stand for, see `registry.lookup`; the error names the flag."""
  try:
    return {name: registry.lookup(section, settings.REGISTRIES[section], name) for name in names}
  except types.UsageError as error:
    raise types.UsageError(f"--{flag}: {error}") from None


def note(text: str) -> None:
  """Tells a user what is worth knowing and no error."""
  print(f"note: {text}", file=sys.stderr, flush=True)
