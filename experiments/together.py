"""Runs that train side by side as one program: what they differ in, and which of them can.

Numbers that a program can trace (rates, weights, missing rates, inner rates) may differ from run to
run. A number that a shape, a loop or a branch depends on cannot be traced: runs that differ in it
are in different programs, and so are runs whose configs differ in anything else than the seed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax import train

from . import build, settings


def numbers_of(run: build.Run) -> dict[str, float | tuple[float, ...]]:
  """The parts of a run's config that are numbers, or intervals: name (`settings.put`) -> value."""
  return {name: value for name, value in _leaves(settings.plain(run.config)) if _is_number(value)}


def _is_number(value: Any) -> bool:
  parts = value if isinstance(value, tuple) and value else (value,)
  return all(isinstance(part, float) for part in parts)


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """Numbers, intervals and whatever else holds no other parts, by name."""
  whole = not isinstance(tree, Mapping | tuple) or not tree or _is_number(tree)
  if whole:
    yield name, tree
  else:
    for key, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
      yield from _leaves(part, f"{name}.{key}" if name else str(key))


def differing(runs: Sequence[build.Run]) -> list[str]:
  """The numbers in which runs differ that are alike otherwise."""
  every = [numbers_of(run) for run in runs]
  return [name for name in every[0] if len({one[name] for one in every}) > 1]


def arrays(run: build.Run, names: Sequence[str]) -> dict[str, Any]:
  """Numbers of a run, as what a program takes."""
  every = numbers_of(run)
  return {name: jax.tree.map(np.float32, every[name]) for name in names}


class Groups:
  """Which runs can be one program; what was found out by tracing is kept."""

  def __init__(self):
    self._traced: dict[tuple[str, ...], bool] = {}

  def of(self, runs: Sequence[build.Run]) -> list[list[int]]:
    """The runs by their positions, those of each program together."""
    alike: dict[str, list[int]] = {}
    for n, run in enumerate(runs):
      alike.setdefault(shape_of(run), []).append(n)
    found: dict[tuple, list[int]] = {}
    for shape, numbers in alike.items():
      names, run = differing([runs[n] for n in numbers]), runs[numbers[0]]
      fixed = []
      if names and not self._can_trace(shape, run, *names):  # mostly all can be, at the first try
        fixed = [name for name in names if not self._can_trace(shape, run, name)]
      for n in numbers:
        own = numbers_of(runs[n])
        found.setdefault((shape, *(own[name] for name in fixed)), []).append(n)
    return list(found.values())

  def _can_trace(self, shape: str, run: build.Run, *names: str) -> bool:
    if (shape, *names) not in self._traced:
      self._traced[shape, *names] = can_trace(run, names)
    return self._traced[shape, *names]


def shape_of(run: build.Run) -> str:
  """What is the same in all runs of a program, as far as it can be seen without tracing."""
  numbers = numbers_of(run)
  every = _leaves(settings.plain(run.config))
  same = {k: v for k, v in every if k not in numbers and k != "seed"}
  # an interval is no number, nor are two where there are three
  kinds = {name: np.shape(value) for name, value in numbers.items()}
  return json.dumps([same, kinds, train.outline(run.recipe)], sort_keys=True)


def can_trace(run: build.Run, names: Sequence[str]) -> bool:
  """Whether numbers may be traced: whether a run of them starts, and has steps."""
  make, dataset = build.recipe_of(run), run.dataset

  def start(numbers):
    return train.start(make(numbers), dataset.train, dataset.spec, run.key)

  try:
    jax.eval_shape(start, arrays(run, names))
  except (TypeError, ValueError):  # JAX's, of a branch, a shape or a conversion; or a refusal
    return False
  return True
