"""The papers' protocols as values: what data go missing in training and in testing.

`robustness` and `ablate` take one by its name (`--protocol`). A new one is an entry of `PROTOCOLS`.
What a flag says counts before what the protocol says, and every system has the same data missing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from mmjax import evaluate, masking, types

from . import build, settings
from .report import papers

MISSING = ("l", "a", "v", "la", "lv", "av")
Mask = Callable[..., types.MaskFn]


class Tests(NamedTuple):
  """A group of test conditions, asked for by its name.

  Attributes:
    conditions: of a mask factory that takes a rate.
    mask: settings of that mask; by default it is the training's, `config.valid` applied.
  """

  conditions: Callable[[Mask], list[evaluate.Condition]]
  mask: Mapping[str, Any] | None = None

  def factory(self, config: settings.Config) -> Mask:
    """The mask of a run's tests."""
    return build.test_mask(config, self.mask)

  def settings(self, config: settings.Config) -> dict[str, Any]:
    """That mask's settings but for its rate, for reports."""
    given = dict(self.mask or build.test_settings(config))
    return {k: v for k, v in given.items() if k not in ("rate", "drop")}


class Column(NamedTuple):
  """A column of a table as a paper prints it: its title, and the condition that it shows.

  The condition "average" is the mean over all of the kind.
  """

  title: str
  kind: str
  condition: str


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How systems are trained and tested.

  Attributes:
    title: what it is, with its source.
    entries: of every system's config; those of a mask or method that does not take them are left
      out.
    tests: groups of conditions by name.
    datasets: further entries by dataset.
    valid_rate: missing rate at which epochs are selected; as in training if None.
    seeds, mask_seeds: of trainings, and of test masks; as the flags write them.
    shown: rates whose predictions and representations are drawn.
    metrics: what is shown first, where the data have it; by default the headline metrics.
    paper: a config -> the paper's values, see `papers.read`; None where we have none.
    layout: columns of tables as the paper prints them, one for each of `metrics`.
    view: how representations are drawn, see `predictions.VIEWS`.
  """

  title: str
  entries: Mapping[str, Any]
  tests: Mapping[str, Tests]
  datasets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  valid_rate: str | None = None
  seeds: str = "5"
  mask_seeds: str = "3"
  shown: str = "0,0.5,0.9"
  metrics: tuple[str, ...] = ()
  paper: Callable[[settings.Config], pd.DataFrame] | None = None
  layout: tuple[Column, ...] = ()
  view: str = "pca"


def rates(text: str, kind: str = "rate") -> Callable[[Mask], list[evaluate.Condition]]:
  """`Tests.conditions`: missing rates, see `evaluate.parse_rates`."""

  def conditions(mask):
    return [one._replace(kind=kind) for one in evaluate.parse_rates(text, mask=mask)]

  return conditions


def missing(mask: Mask) -> list[evaluate.Condition]:
  """`Tests.conditions`: the six sets in which some but not all modalities are missing."""
  return [evaluate.missing_condition(letters, mask=mask) for letters in MISSING]


def missing_or_complete(mask: Mask) -> list[evaluate.Condition]:
  """`missing`, and everything there."""
  complete = evaluate.rate_condition(0.0, mask=mask)
  return [*missing(mask), complete._replace(kind="complete", name="all")]


def available(kept: str) -> Column:
  """A column of what is left: "la" is titled {l,a}."""
  gone = "".join(letter for letter in "lav" if letter not in kept)
  return Column("{" + ",".join(kept) + "}", "missing", gone)


def m3s_paper(config: settings.Config) -> pd.DataFrame:
  """The M³S paper's values of the run's own method and training rate."""
  rate = "-".join(f"{end:g}" for end in settings.plain(config.mask.get("rate", ())))
  return papers.m3s(config.data.name, build.title(config), rate)


WHOLE = {"name": "frames"}  # at a rate of 1 all of a modality is gone
F1 = ("f1_non0", "f1_has0", "f1_happy", "f1_sad", "f1_angry", "f1_neutral", "f1")

PROTOCOLS: dict[str, Protocol] = {
  "lnln": Protocol(
    title="LNLN's (Zhang, Wang & Yu 2024): steps go missing one by one",
    entries={
      "method.name": "spl",
      "mask.name": "bernoulli",
      "mask.rate": (0.0, 1.0),
      "mask.complete_share": 0.5,
    },
    tests={"rates": Tests(rates("0:0.9:0.1")), "modalities": Tests(missing)},
    valid_rate="0.5",
    seeds="1111,1112,1113",
    paper=lambda config: papers.read("lnln", config.data.name),
  ),
  "hrlf": Protocol(
    title="HRLF's (Li et al. 2024): frames and modalities go missing, both in training, each alone"
    " in testing",
    entries={"method.name": "spl", "mask.name": "msm"},
    tests={
      "rates": Tests(rates("0:1:0.1"), {"name": "frames"}),
      "modalities": Tests(missing_or_complete, WHOLE),
    },
    datasets={"iemocap": {"data.task": "binary"}},
    shown="0,0.5,1",
    metrics=F1,
    paper=lambda config: papers.read("hrlf", config.data.name),
    layout=(
      *(available(kept) for kept in ("l", "a", "v", "la", "lv", "av")),
      Column("Avg.", "missing", "average"),
      Column("{l,a,v}", "complete", "all"),
    ),
    view="tsne",
  ),
  "m3s": Protocol(
    title="M³S's (Chi et al. 2022): one span of each modality goes missing",
    entries={"method.name": "m3s", "mask.name": "span", "mask.rate": (0.4, 0.6)},
    tests={
      "intervals": Tests(rates("0.4-0.6,0.6-0.8", "interval")),
      "rates": Tests(rates("0:0.9:0.1")),
    },
    paper=m3s_paper,
  ),
  "gcnet": Protocol(
    title="GCNet's (Lian et al. 2022): whole modalities go missing, one always stays",
    entries={"method.name": "spl", "mask.name": "gcnet", "mask.rate": (0.0, 0.7)},
    tests={"rates": Tests(rates("0:0.7:0.1")), "modalities": Tests(missing, WHOLE)},
    datasets={"iemocap": {"data.task": "classification"}},
    seeds="10",
    shown="0,0.3,0.7",
  ),
  "imder": Protocol(
    title="IMDer's (Wang et al. 2023): whole modalities go missing in fixed shares of the samples",
    entries={"method.name": "spl", "mask.name": "imder", "mask.rate": (0.0, 0.7)},
    tests={"rates": Tests(rates("0:0.7:0.1")), "modalities": Tests(missing_or_complete, WHOLE)},
    shown="0,0.3,0.7",
  ),
}


def describe(protocol: Protocol, asked: list[str], config: settings.Config) -> dict[str, str]:
  """What goes missing in a run's tests, in words, by group."""
  told = {}
  for name in asked:
    given = protocol.tests[name].settings(config)
    told[name] = f"{masking.describe(**given)}. The rate is {masking.quantity(given['name'])}."
  return told
