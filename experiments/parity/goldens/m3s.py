"""Compares the M³S meta step with a recorded one: inner loop, meta-gradients, updates.

The recorded model encodes audio and vision by an LSTM's last state and text by a linear
map; `feat` masks the encoded vectors, `time` the inputs. Its weights keep PyTorch's layout.
"""

import json
import re
from collections.abc import Iterator, Mapping
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import layers, masking, meta, types

ADAM_RATE = 1e-3  # of the recorded outer Adam steps


def compare(z: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
  """Yields (group, name, ours, recorded) for every precision, mode and case in the file."""
  cases = sorted({tuple(k.split("/")[:3]) for k in z if re.match(r"f(32|64)/\w+/(K\d|theta0)", k)})

  def check(case):
    precision, mode, name = case
    with jax.enable_x64(precision == "f64"):
      found = (_theta0 if name == "theta0" else _meta_step)(
        z, mode, name, np.dtype(f"float{precision[1:]}")
      )
      return [(key, np.asarray(ours)) for key, ours in found]

  with futures.ThreadPoolExecutor() as pool:  # most of the time is spent on compiling
    for case, found in zip(cases, pool.map(check, cases), strict=True):
      group = "/".join(case)
      yield from ((group, key, ours, z[f"{group}/{key}"]) for key, ours in found)


def _params(z, dtype):
  return {entry["name"]: jnp.asarray(z[f"param0/{entry['name']}"], dtype) for entry in _spec(z)}


def _spec(z):
  return json.loads(str(z["param_spec"]))


def _flat(z, params) -> np.ndarray:
  return np.concatenate([np.asarray(params[entry["name"]]).ravel() for entry in _spec(z)])


def _batch(z, mode, name, steps, dtype) -> types.Batch:
  """X1 or X2, each of as many rows as are recorded.

  The recorded masks lie in `info`, [B, 1 + steps, T]: the fixed one, and that of each inner step.
  X2 has one mask, which stands at all places.
  """

  def modality(of):
    x = jnp.asarray(z[f"input/{name}/{of}"], dtype)
    x = x if x.ndim == 3 else x[..., None]  # the text vector: its entries are the steps
    return types.modality(x)

  def masks(of):
    fresh = [f"{name}_step{i}" if name == "X1" else name for i in range(steps)]
    return jnp.asarray(np.stack([z[f"mask/{mode}/{m}/{of}"] for m in (name, *fresh)], 1), dtype)

  label = jnp.asarray(z[f"input/{name}/label"], dtype)
  info = {of: masks(of) for of in types.MODALITIES}
  rows = jnp.arange(len(label))
  modalities = {of: modality(of) for of in types.MODALITIES}
  return types.Batch(**modalities, label=label, index=rows, info=info)


def _given_mask(mode, which_of) -> types.MaskFn:
  """A mask function that returns the recorded masks; `which_of(key)` picks a set of them."""

  def mask(key, batch):
    given = {name: m[:, which_of(key)] for name, m in batch.info.items()}
    if mode == "time":
      seen = {
        name: getattr(batch, name)._replace(seen=given[name][..., None] > 0) for name in given
      }
      batch = batch._replace(**seen)
    return batch._replace(info=given)

  return mask


def _encode(params, batch):
  """[B, H] encoded modality vectors in the recorded order audio, vision, text."""

  def last_state(name):
    m = getattr(batch, name)
    weights = {
      ours: params[f"{name}.{theirs}_l0"].T
      for ours, theirs in (
        ("w_ih", "weight_ih"),
        ("w_hh", "weight_hh"),
        ("b_ih", "bias_ih"),
        ("b_hh", "bias_hh"),
      )
    }
    lstm = layers.LSTM(weights["w_hh"].shape[0])
    return lstm.apply({"params": weights}, masking.observed(m), m.valid)[1]

  text = masking.observed(batch.text)[..., 0] @ params["text.weight"].T + params["text.bias"][None]
  return [last_state("audio"), last_state("vision"), text]


def _forward(params, batch, mode):
  encoded = _encode(params, batch)
  kept = encoded
  if mode == "feat":
    masks = [batch.info[name] for name in ("audio", "vision", "text")]
    kept = [h * m for h, m in zip(encoded, masks, strict=True)]
  joint = jnp.concatenate(kept, -1)
  hidden = jnp.tanh(joint @ params["fc1.weight"].T + params["fc1.bias"][None])
  prediction = (hidden @ params["fc2.weight"].T + params["fc2.bias"][None])[:, 0]
  return prediction, jnp.concatenate(encoded, -1), joint


def _loss_of(mode):
  def loss(params, batch, key, extra):
    error = _forward(params, batch, mode)[0] - batch.label
    value = jnp.mean(error**2) + 0.1 * jnp.mean(jnp.abs(error))
    return value, types.Aux({}, extra)

  return loss


def _theta0(z, mode, case, dtype):
  params = _params(z, dtype)
  mask = _given_mask(mode, lambda key: 0)

  @jax.jit  # X1 and X2 may have as many rows: then one program
  def everything(params, masked):
    found = _forward(params, masked, mode)
    return found, jax.value_and_grad(_loss_of(mode), has_aux=True)(params, masked, None, {})

  for name in ("X1", "X2"):
    masked = mask(jax.random.key(0), _batch(z, mode, name, 0, dtype))
    (prediction, before, after), ((value, _), grads) = everything(params, masked)
    yield f"{name}/pred", prediction
    yield f"{name}/encoded_concat_before_mask", before
    yield f"{name}/encoded_concat_after_mask", after
    yield f"{name}/loss", value
    yield f"{name}/grad", _flat(z, grads)


def _meta_step(z, mode, case, dtype):
  config = json.loads(str(z["config"]))
  steps = int(case.split("_")[0].removeprefix("K"))
  fresh = case.endswith("freshmask")
  momentum = re.search(r"momentum([\d.]+)", case)
  inner = optax.sgd(config["alpha"], momentum=float(momentum.group(1)) if momentum else None)
  params = _params(z, dtype)
  support, query = (_batch(z, mode, name, steps * fresh, dtype) for name in ("X1", "X2"))
  key = jax.random.key(0)
  keys = meta.meta_keys(key, steps, fresh)
  loss = _loss_of(mode)

  def which_of(mask_key):  # the recorded mask of inner step i stands at 1 + i
    if not fresh:
      return 0
    data = jax.random.key_data
    return 1 + jnp.argmax(jnp.all(data(keys.support_mask) == data(mask_key)[None], -1))

  mask = _given_mask(mode, which_of)
  meta_losses = {
    order: meta.m3s(
      loss, mask, inner_steps=steps, inner_optimizer=inner, order=order, fresh_masks=fresh
    )
    for order in meta.ORDERS
  }

  @jax.jit
  def everything(params):  # one program: compiling is what takes the time
    adapted = meta.adapt(loss, mask, params, support, keys, {}, optimizer=inner, fresh_masks=fresh)
    grads = {
      order: jax.value_and_grad(meta_loss, has_aux=True)(params, (support, query), key, {})
      for order, meta_loss in meta_losses.items()
    }
    return adapted, grads

  (adapted, inner_losses), grads = everything(params)
  yield "theta_K", _flat(z, adapted)
  yield "inner_losses", inner_losses
  yield "outer_loss", grads["first"][0][0]
  adam = optax.adam(ADAM_RATE)
  adam_update = jax.jit(adam.update)
  for order, short in (("first", "fo"), ("second", "so")):
    gradient = grads[order][1]
    yield f"{short}_grad", _flat(z, gradient)
    yield f"after_sgd_{short}", _flat(z, params) - config["beta"] * _flat(z, gradient)
    state, theta = adam.init(params), params
    recorded = f"f{dtype.itemsize * 8}/{mode}/{case}/after3_adam_{short}"
    for count in range(3 if recorded in z else 1):
      gradient = everything(theta)[1][order][1] if count else gradient
      updates, state = adam_update(gradient, state)
      theta = jax.tree.map(jnp.add, theta, updates)
      if count in (0, 2):
        yield f"after{'3' if count else ''}_adam_{short}", _flat(z, theta)
