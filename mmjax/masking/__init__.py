"""Missing data: masks that mark entries of a batch as unseen.

A `MaskFn` takes a key and a batch and rewrites `seen` only: `x` stays clean, so that a
teacher or a reconstruction target can read it, while `observed` is what a student path
reads and `erase` makes the clean values unreachable. `protocols.MASKS` has the factories of
masks by name; a new one is a function and a line there, or any importable name.

Rules that hold for every mask here:

  * A sample's mask depends on the key, its `batch.index` and the modality, and on nothing
    else: neither on the batch size nor on the order of the samples. So it is for every kind
    of key, those of `rbg` and `jax.random.PRNGKey` included.
  * Masks only take away: a new mask is and-ed into `seen`.
  * Padding steps are left as they are (a step mask is True on them). They hold 0 or [PAD],
    and models leave them out by `valid`.
  * Of token ids, the first and the last valid one ([CLS], [SEP]) always stay seen; the others
    become `fill` ([UNK]) when they are missing, and the attention mask `valid` stays.

A missing rate is a number; a `(low, high)` pair, from which every sample and modality draws
its own rate uniformly; a mapping from modality names to either (a modality that is left out
stays complete); or an array [3] or [3, 2], in the order text, audio, vision. Rates may be
traced, so a grid of rates compiles once; rates that are not traced are checked.
"""

from mmjax.masking.protocols import (
  MASKS,
  SUBSETS,
  available,
  bernoulli,
  blocks,
  compose,
  describe,
  drop,
  family,
  frames,
  gcnet,
  imder,
  make,
  mixture,
  msm,
  quantity,
  random_drop,
  span,
  takes_rate,
)
from mmjax.masking.transforms import (
  Rate,
  at_least_one,
  complement,
  complete,
  ends,
  erase,
  observed,
  present,
  sample_keys,
  see,
  shared_uniforms,
  span_bounds,
  span_mask,
  step_mask,
  steps,
  threefry,
  with_rates,
)

__all__ = [
  "MASKS",
  "SUBSETS",
  "Rate",
  "at_least_one",
  "available",
  "bernoulli",
  "blocks",
  "complement",
  "complete",
  "compose",
  "describe",
  "drop",
  "ends",
  "erase",
  "family",
  "frames",
  "gcnet",
  "imder",
  "make",
  "mixture",
  "msm",
  "observed",
  "present",
  "quantity",
  "random_drop",
  "sample_keys",
  "see",
  "shared_uniforms",
  "span",
  "span_bounds",
  "span_mask",
  "step_mask",
  "steps",
  "takes_rate",
  "threefry",
  "with_rates",
]
