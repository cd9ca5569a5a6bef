"""Compares LMF with a recorded MMSA run, batch norm in training and two steps of Adam included."""

from collections.abc import Iterator
from typing import Any

from mmjax.models import lmf

from .. import goldens
from . import tfn


@goldens.each_case
def compare(z: goldens.Arrays) -> Iterator[goldens.Row]:
  """Yields outputs, loss and gradients, and what the file has of training."""
  config = goldens.config(z)
  settings: dict[str, Any] = dict(
    hidden_sizes=tuple(config["hidden_dims"]),
    rank=config["rank"],
    input_dropout=tuple(config["dropouts"][:2]),
  )
  optimizer = dict(
    name="adam",
    learning_rate=config["learning_rate"],
    weight_decay=config["weight_decay"],
    groups=(("_factor", dict(learning_rate=config["factor_lr"])),),
  )
  yield from tfn.compare_subnets(
    z, lmf.make(**settings), lmf.Lmf(**settings), lmf.TORCH_RULES, "fusion", optimizer
  )
