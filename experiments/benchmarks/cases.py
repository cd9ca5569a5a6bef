"""What is measured: settings, our compiled steps, and the same systems in PyTorch."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import masking, meta, models, parallel, recurrence, torch_import, types

RATE = 1e-3
ORDERS = {1: "first", 2: "second"}


class Setting(NamedTuple):
  """Shapes of the data.

  Attributes:
    shapes: (length, width) of text, audio and vision.
    rows: B, of the support set and of the query set.
    tokens: whether the text is token ids and a BERT of base size reads them.
  """

  shapes: tuple[tuple[int, int], ...]
  rows: int
  tokens: bool = False


ALIGNED, UNALIGNED = ((50, 768), (50, 5), (50, 20)), ((50, 768), (375, 5), (500, 20))
SETTINGS = {
  "aligned_b32": Setting(ALIGNED, 32),
  "aligned_b128": Setting(ALIGNED, 128),
  "unaligned_b128": Setting(UNALIGNED, 128),
  "bert": Setting(ALIGNED, 4, tokens=True),
}
BERT = dict(from_scratch=True)  # of base size, for settings of tokens
MODELS = {
  "misa": lambda: models.MODELS["misa"](dropout=0.0, bert=BERT),
  "self_mm": lambda: models.MODELS["self_mm"](head_dropout=(0.0, 0.0, 0.0, 0.0), bert=BERT),
}


def make_batch(setting: Setting, rows: int, seed: int = 0) -> types.Batch:
  """Rows of noise, of which half of the steps are missing."""
  random = np.random.default_rng(seed)
  share = random.uniform(0.5, 1, (rows, 1))  # a long utterance is long in every modality

  def modality(length, width, tokens=False):
    valid = np.arange(length) < np.ceil(share * length)
    if tokens:
      x = np.where(valid, random.integers(1000, 30000, (rows, length)), 0).astype(np.int32)
      return types.modality(x, valid)
    x = random.normal(size=(rows, length, width)).astype(np.float32) * valid[..., None]
    return types.modality(x, valid)

  text, *others = setting.shapes
  label: Any = random.uniform(-3, 3, rows).astype(np.float32)
  index: Any = np.arange(rows, dtype=np.int32)
  parts = modality(*text, setting.tokens), *(modality(*shape) for shape in others)
  return masking.span(0.5)(
    jax.random.key(1), types.Batch(*parts, label=label, index=index, info={})
  )


class Case(NamedTuple):
  """A system with its data; masks are drawn already, both sides get the same.

  Attributes:
    system: the system.
    rules: how PyTorch names its parameters.
    loss: its loss without dropout.
    args: (params, batch, key, extra) of a loss; the batch has 2B rows.
  """

  system: types.System
  rules: torch_import.Rules
  loss: types.LossFn
  args: tuple[Any, ...]


def prepare(model: str, setting: Setting) -> Case:
  """Our side of a comparison."""
  batch = make_batch(setting, 2 * setting.rows)
  system = MODELS[model]()
  text, *others = setting.shapes
  spec = types.Spec(
    types.ModalitySpec(*text, setting.tokens),
    *(types.ModalitySpec(*shape) for shape in others),
    num_train=2 * setting.rows,
  )
  params, extra = system.init(jax.random.key(0), spec)
  whole = system.loss

  def loss(params, batch, key, extra):  # MISA's Transformer has dropout that is no setting
    return whole(params, batch, None, extra)

  rules = models.torch_rules(model)
  return Case(
    system, rules, loss, (params, jax.tree.map(jnp.asarray, batch), jax.random.key(2), extra)
  )


def _keep(key, batch):
  return batch


def ours(case: Case, order: int, k: int, mesh: jax.sharding.Mesh | None = None):
  """`(params, batch, key, extra) -> ((loss, aux), meta-gradients)`, as the configs set M³S."""
  loss = meta.m3s(
    parallel.share(case.loss, mesh),
    _keep,
    inner_steps=k,
    inner_optimizer=optax.sgd(RATE),
    order=ORDERS[order],
    mode="mixed",
  )
  return jax.value_and_grad(loss, has_aux=True)


def naive(case: Case, order: int, k: int):
  """M³S as one would write it first: K steps unrolled, plain scans, nothing recomputed."""

  def loss(params, batch, key, extra):
    support, query = meta.split_support_query(batch)
    adapted = params
    for _ in range(k):
      grads = jax.grad(lambda p: case.loss(p, support, key, extra)[0])(adapted)
      adapted = jax.tree.map(lambda p, g: p - RATE * g, adapted, grads)
    if order == 1:
      adapted = jax.lax.stop_gradient(adapted)
      adapted = jax.tree.map(lambda a, p: a + p - jax.lax.stop_gradient(p), adapted, params)
    return case.loss(adapted, query, key, extra)

  return jax.value_and_grad(loss, has_aux=True)


def compile_timed(function, *args, mesh=None):
  """The compiled function and the seconds that took."""
  began = time.perf_counter()
  compiled = parallel.jit(function, mesh).lower(*args).compile()
  return compiled, time.perf_counter() - began


class Step(NamedTuple):
  """An iteration in JAX, ready to run.

  Attributes:
    run: computes it once and waits for the result.
    compile_s: seconds that compiling took.
    temp_bytes: its temporaries on all devices together.
  """

  run: Callable[[], Any]
  compile_s: float
  temp_bytes: int


def make_step(case: Case, order: int, k: int, devices: int = 1) -> Step:
  """`ours`, the rows shared by some devices of the process."""
  mesh = parallel.local_mesh(devices) if devices > 1 else None
  args = parallel.replicate(case.args, mesh)
  step, took = compile_timed(ours(case, order, k, mesh), *args, mesh=mesh)
  return Step(lambda: jax.block_until_ready(step(*args)), took, devices * temporaries(step))


def make_linen_step(case: Case, order: int, k: int) -> Step:
  """`naive` with linen's own LSTM, as a user of JAX would write it alone."""
  with (
    mock.patch.object(recurrence, "lstm", _linen_lstm),
    mock.patch.object(recurrence, "bilstm", _linen_bilstm),
  ):
    step, took = compile_timed(naive(case, order, k), *case.args)
  return Step(lambda: jax.block_until_ready(step(*case.args)), took, temporaries(step))


def _linen_lstm(x, valid, w_ih, w_hh, bias, *, reverse=False):
  """`recurrence.lstm` by `nn.RNN`, with our weights under its names."""
  names, split = "ifgo", functools.partial(jnp.split, indices_or_sections=4, axis=-1)
  kernels = {f"i{name}": {"kernel": w} for name, w in zip(names, split(w_ih), strict=True)}
  for name, w, b in zip(names, split(w_hh), split(bias), strict=True):
    kernels[f"h{name}"] = {"kernel": w, "bias": b}
  rnn = nn.RNN(
    nn.OptimizedLSTMCell(w_hh.shape[0]),
    time_major=True,
    return_carry=True,
    reverse=reverse,
    keep_order=True,
  )
  applied: Any = rnn.apply({"params": {"cell": kernels}}, x, seq_lengths=valid.sum(0))
  (_, final), states = applied
  return jnp.where(valid[:, :, None], states, 0), final


def _linen_bilstm(x, valid, forward, backward):
  (ahead, last), (back, first) = (
    _linen_lstm(x, valid, *forward),
    _linen_lstm(x, valid, *backward, reverse=True),
  )
  return (ahead, back), (last, first)


def temporaries(compiled) -> int:
  """Bytes that a program needs on a device beside its arguments and results."""
  return compiled.memory_analysis().temp_size_in_bytes


def make_module(model: str, setting: Setting, case: Case):
  """The PyTorch module with our parameters in it."""
  import torch

  from . import peers  # needs torch, which counting kernels does not

  widths = [width for _, width in setting.shapes]
  module = peers.MODELS[model](*widths, tokens=setting.tokens).eval().to(peers.DEVICE)
  shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
  state = torch_import.to_torch(case.args[0], shapes, case.rules)
  module.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
  return module


def check(rules: torch_import.Rules, mine, theirs, name: str) -> None:
  """Raises unless losses and meta-gradients agree."""
  (value, _), grads = mine
  np.testing.assert_allclose(value, float(theirs[0]), rtol=1e-3)
  found = {name: g.detach().cpu().numpy() for name, g in theirs[1].items() if g is not None}
  named = torch_import.to_torch(grads, {n: g.shape for n, g in found.items()}, rules)
  for parameter, expected in found.items():
    # where rounding turns a ReLU over, a few entries differ by percents (between two orders of the
    # same rows on one side, too): single entries are held to less than norms
    error = named[parameter] - expected
    for kind, order, share in (("norm", 2, 0.02), ("largest entry", np.inf, 0.1)):
      off, size = (np.linalg.norm(a.ravel(), order) for a in (error, expected))
      if off > share * size + 1e-6:
        raise AssertionError(
          f"{name}: the meta-gradients of {parameter} differ: {kind} {off:.1e} of {size:.1e}."
        )
