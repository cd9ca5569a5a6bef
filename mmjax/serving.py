"""Trained models as one file that serves predictions: `mmjax.export`, on `jax.export`.

  exported = mmjax.export(mmjax.load("runs/misa-m3s"))
  pathlib.Path("misa.jaxexport").write_bytes(exported.serialize())

and where it serves, without a config, a run's folder or the model's code:

  predict = jax.jit(serving.read("misa.jaxexport").call)
  predict(batch)["prediction"]  # any number of rows

Importing this module tells JAX how a batch is written to such a file and read from one.
"""

import os
import pathlib
from collections.abc import Sequence

import jax
from jax import export as jax_export

from mmjax import masking, runs, types

for _kind in (types.Batch, types.Modality):
  jax_export.register_namedtuple_serialization(_kind, serialized_name=f"mmjax.{_kind.__name__}")


def example(spec: types.Spec) -> types.Batch:
  """A batch of two rows with all that a predictor reads: token runs have segments too."""
  batch = types.example_batch(spec)
  if spec.text.tokens:
    batch = batch._replace(info={"segment_ids": batch.text.x})
  return batch


def export(
  run: runs.Trained,
  *,
  batch_size: int | None = None,
  platforms: Sequence[str] | None = None,
) -> jax_export.Exported:
  """Compiles the predictions of a trained model into something that can be stored and served.

  Args:
    run: from `mmjax.load`.
    batch_size: rows of a batch; any number by default.
    platforms: "cpu", "cuda", "tpu"; this process's by default.

  Returns:
    Its `.call(batch)` gives "prediction", [B] or [B, C] logits, and "feature" [B, D] if the
    model has one; `.serialize()` is what `read` reads. The batch is one of `predict.prepare`, and
    has no `info` but the "segment_ids" of token runs; labels are not read. Modalities that the run
    never sees, and unseen steps, are erased.

  Raises:
    UsageError: if the model reads whole conversations, or cannot do with any number of rows.
  """
  if run.system.conversations:
    raise types.UsageError(
      "this model reads whole conversations, whose shapes a served batch does not tell: predict"
      " with `mmjax-predict`."
    )
  mask = masking.drop(run.reading.drop)

  def predict(batch):
    batch = masking.erase(mask(jax.random.key(0), batch))
    out = run.system.predict(run.params, batch, run.extra)
    return {name: out[name] for name in ("prediction", "feature") if name in out}

  batch = example(run.spec)
  rows = batch_size or jax_export.symbolic_shape("b")[0]
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), batch)
  make = jax_export.export(jax.jit(predict), platforms=platforms)
  if batch_size:
    return make(shapes)
  try:
    return make(shapes)
  except Exception as error:
    jax.eval_shape(predict, batch)  # whatever fails here too is another fault
    raise types.UsageError(
      "this model cannot be exported for any number of rows"
      f" ({type(error).__name__}: {str(error).splitlines()[0]}): give a batch_size, to which"
      " batches are then filled up."
    ) from error


def read(path: str | os.PathLike) -> jax_export.Exported:
  """What `export` made, from the file of its `.serialize()`.

  Raises:
    UsageError: if there is no such file, or JAX cannot read it.
  """
  try:
    return jax_export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
  except FileNotFoundError:
    raise types.UsageError(f"{path}: there is no such file.") from None
  except Exception as error:  # whatever its bytes happen to mean
    raise types.UsageError(
      f"{path}: this is no exported model that jax {jax.__version__} reads"
      f" ({type(error).__name__}: {error})."
    ) from None
