"""A toy batch and a toy system, so that tests of the trainer need no real model."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import masking, types

SHAPES = {"text": (4, 3), "audio": (6, 2), "vision": (5, 2)}
SPEC = types.Spec(*(types.ModalitySpec(*SHAPES[m]) for m in types.MODALITIES), num_train=32)


def make_batch(rows: int, seed: int = 0, dtype=np.float32) -> types.Batch:
  """Labels are a linear function of each modality's mean over the valid steps."""
  random = np.random.default_rng(seed)
  modalities, label = [], np.zeros(rows)
  for name in types.MODALITIES:
    length, dim = SHAPES[name]
    valid = np.arange(length) < random.integers(2, length + 1, (rows, 1))
    x = random.normal(size=(rows, length, dim)) * valid[..., None]
    label = label + x.sum((1, 2)) / valid.sum(1)
    modalities.append(types.modality(x.astype(dtype), valid))
  label = label.astype(dtype)
  return types.Batch(*modalities, label, np.arange(rows, dtype=np.int32), {})


def features(batch: types.Batch):
  """[B, 7] mean of the observed values of each modality."""
  return jnp.concatenate(
    [
      masking.observed(m).sum(1) / m.valid.sum(1, keepdims=True).astype(m.x.dtype)
      for m in (batch.text, batch.audio, batch.vision)
    ],
    -1,
  )


def predict(params, batch, extra):
  del extra
  hidden = jnp.tanh(features(batch) @ params["encoder"]["kernel"])
  prediction = hidden @ params["head"]["kernel"] + params["head"]["bias"]
  return {"prediction": prediction, "feature": hidden}


def loss(params, batch, key, extra):
  error = predict(params, batch, extra)["prediction"] - batch.label
  value = jnp.mean(error**2)
  noise = 0.0 if key is None else 0.01 * jax.random.normal(key)
  extra = {**extra, "calls": extra["calls"] + 1} if "calls" in extra else extra
  return value + noise * params["head"]["bias"], types.Aux({"mse": value}, extra)


def init(key, spec):
  width = sum(getattr(spec, m).dim for m in types.MODALITIES)
  k1, k2 = jax.random.split(key)
  params = {
    "encoder": {"kernel": jax.random.normal(k1, (width, 8)) * 0.5},
    "head": {"kernel": jax.random.normal(k2, (8,)) * 0.5, "bias": jnp.zeros(())},
  }
  return params, {"calls": jnp.int32(0)}


def init_for(spec: types.Spec):
  """`init` for the widths of another spec."""
  width = sum(getattr(spec, m).dim for m in types.MODALITIES)

  def start(key, _):
    params, extra = init(key, spec)
    return {**params, "encoder": {"kernel": 0.1 * jax.random.normal(key, (width, 8))}}, extra

  return start


def make() -> types.System:
  """The system for configs: `toy:make`."""
  return make_system()


def make_lingering(seconds: float = 0.2) -> types.System:
  """A system for configs whose epochs take a while, so that a training can be met in its middle."""

  def on_epoch(params, extra, epoch, train):
    del epoch, train
    time.sleep(seconds)
    return params, extra

  return make_system(phases=(types.Phase("main", loss, on_epoch=on_epoch),))


def make_system(**kwargs) -> types.System:
  phases = kwargs.pop("phases", (types.Phase("main", loss),))
  return types.System(init, predict, phases, **kwargs)
