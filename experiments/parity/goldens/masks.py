"""Compares `mmjax.masking` with recorded masks: given uniforms, expected masks and outputs.

Everything runs in float64, the precision of the recorded uniforms and rates.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from mmjax import masking, types

UNK = 100
Row = tuple[str, str, np.ndarray, np.ndarray]


def compare(z: Mapping[str, np.ndarray]) -> Iterator[Row]:
  """Yields (group, name, ours, theirs) for all that the file holds.

  Args:
    z: the arrays of a file of the masks schema; sizes, tags and rates are read off it.

  Yields:
    A group for the spans, for the exhaustive table of spans, for the spans applied to
    features, and for each tag and modality of the per-step masks.
  """
  with jax.enable_x64(True):
    if "m3s/u" in z:
      yield from _spans(z)
    if "m3s_exhaustive/mask" in z:
      yield from _exhaustive(z)
    if "m3s_apply/x" in z:
      yield from _applied(z)
    for key in z:
      if key.endswith("/uniform"):
        yield from _steps(z, *key.removesuffix("/uniform").rsplit("/", 1))


def _padded(seen: np.ndarray, length: np.ndarray) -> np.ndarray:
  """A mask as the files hold it: -1 beyond the length."""
  step = np.arange(seen.shape[-1])
  return np.where(step < length[:, None], seen, -1)


def _spans(z) -> Iterator[Row]:
  length, theirs = z["m3s/T"], z["m3s/mask"]
  start, k = masking.span_bounds(z["m3s/u"], z["m3s/r"], length)
  seen = masking.span_mask(start, k, theirs.shape[-1])
  yield "m3s span", "k", np.asarray(k), z["m3s/k"]
  yield "m3s span", "lambda", np.asarray(start), z["m3s/lambda"]
  yield "m3s span", "mask", _padded(np.asarray(seen), length), theirs
  if "m3s/k_float32_product" in z:
    _, k = masking.span_bounds(np.float32(z["m3s/u"]), np.float32(z["m3s/r"]), length)
    yield "m3s span", "k in float32", np.asarray(k), z["m3s/k_float32_product"]


def _exhaustive(z) -> Iterator[Row]:
  length, start = z["m3s_exhaustive/T"], z["m3s_exhaustive/lambda"]
  theirs = z["m3s_exhaustive/mask"]
  k = masking.span_bounds(np.zeros(length.shape), z["m3s_exhaustive/r"], length)[1]
  seen = masking.span_mask(start, k, theirs.shape[-1])
  yield "m3s every span", "k", np.asarray(k), z["m3s_exhaustive/k"]
  yield "m3s every span", "mask", _padded(np.asarray(seen), length), theirs


def _applied(z) -> Iterator[Row]:
  x = z["m3s_apply/x"]
  seen = masking.span_mask(z["m3s_apply/lambda"], z["m3s_apply/k"], x.shape[-1])
  m = types.modality(x, seen=seen)
  yield "m3s span", "masked features", np.asarray(masking.observed(m)), z["m3s_apply/y"]


def _steps(z, tag: str, modality: str) -> Iterator[Row]:
  at = f"{tag}/{modality}"
  tokens = modality == "text"
  valid = z[f"{at}/valid_mask"].astype(bool)
  x = z["seq_input/text_ids" if tokens else f"seq_input/{modality}"]
  seen = masking.step_mask(z[f"{at}/uniform"], z[f"{at}/missing_rate"], valid)
  if tokens:
    seen = seen | masking.ends(valid)
  yield at, "mask", np.asarray(seen & valid), z[f"{at}/missing_mask"]

  m = types.modality(x, valid, seen if tokens else seen[..., None], fill=UNK if tokens else 0)
  kept = valid if tokens else valid[..., None]
  yield at, "output", np.where(kept, masking.observed(m), 0), z[f"{at}/output"]  # padding is 0
