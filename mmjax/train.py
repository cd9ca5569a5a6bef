"""The one trainer: steps, epochs as one compiled program, and the fit loop around them.

A training run is a pytree (`Progress`) and pure functions of it: saving that pytree and
loading it again continues the run bit for bit, in the middle of an epoch too.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import metrics, optim, parallel, stream, types

# One constant per purpose, folded into the run's key.
INIT, DATA, LOSS, METHOD = range(4)


class NonFiniteLoss(FloatingPointError):
  """A loss or gradient became NaN or infinite; `step` is the optimizer step."""

  def __init__(self, phase: str, step: int):
    super().__init__(f"the loss or its gradient is not finite in phase {phase!r}, step {step}.")
    self.step = step


class Recipe(NamedTuple):
  """How a system is trained.

  Attributes:
    system: the model.
    method: the training method (`mmjax.meta`): it turns each phase's loss into the one that is
      trained.
    optimizers: of each phase, by its name.
    batch_size: B, samples of one draw.
    epochs: number of epochs; each passes every draw's permutation of the data once.
    select: the validation metric that picks the best epoch.
    larger_is_better: direction of `select`.
    patience: stop after so many epochs without a better one (None: never).
    also: further metrics, each of which keeps the parameters of its own best epoch.
    mesh: devices that share each batch, see `parallel`; None for one device.
  """

  system: types.System
  method: types.Method
  optimizers: Mapping[str, optax.GradientTransformation]
  batch_size: int
  epochs: int = 1
  select: str = "mae"
  larger_is_better: bool = False
  patience: int | None = None
  also: tuple[str, ...] = ()
  mesh: jax.sharding.Mesh | None = None


class Progress(NamedTuple):
  """Where a run stands.

  Attributes:
    state: parameters, optimizer states, extra.
    best: {"params", "extra"} of the best validated epoch (the initial ones before).
    best_score: [] its score, larger is better; -inf before the first.
    best_epoch: [] int32, -1 before the first.
    others: of each metric in `Recipe.also`: {"params", "extra", "score"} of its best epoch.
    epoch, phase, done: [] int32, the epoch in progress, its phase and that phase's steps done.
    sums: metrics summed over the epoch's steps so far, by phase.
  """

  state: types.TrainState
  best: dict[str, Any]
  best_score: jax.Array
  best_epoch: jax.Array
  others: dict[str, dict[str, Any]]
  epoch: jax.Array
  phase: jax.Array
  done: jax.Array
  sums: dict[str, dict[str, jax.Array]]


class EpochReport(NamedTuple):
  """One finished epoch.

  Attributes:
    epoch: its number, from 0.
    train: mean of each training metric, as "phase/metric" (no prefix with a single phase).
    valid: the validation metrics.
    is_best: whether it is the best one so far.
    progress: where the run stands after it.
  """

  epoch: int
  train: dict[str, float]
  valid: dict[str, float]
  is_best: bool
  progress: Progress


def create(recipe: Recipe, spec: types.Spec, key: types.PRNGKey) -> types.TrainState:
  """Initial parameters, optimizer states and extra of a run."""
  params, extra = recipe.system.init(jax.random.fold_in(key, INIT), spec)
  extra = _copy(extra)  # a system may use one array twice, but buffers are donated once

  @jax.jit  # one program, not one for each shape
  def init_optimizers(params):
    return {
      phase.name: recipe.optimizers[phase.name].init(optim.split(params, phase.trains)[0])
      for phase in recipe.system.phases
    }

  opt = init_optimizers(params)
  return types.TrainState(jnp.int32(0), params, opt, extra, {})


def make_step(
  recipe: Recipe, phase: types.Phase
) -> Callable[..., tuple[types.TrainState, dict[str, jax.Array]]]:
  """One optimizer step of a phase: `(state, batch, key) -> (state, metrics)`.

  `key` is the run's; the step folds `state.step` into it. Only the parameters that
  `phase.trains` finds are differentiated, in the inner loop of a meta-gradient too.
  """
  optimizer = recipe.optimizers[phase.name]

  def step(state, batch, key):
    trained, constant = optim.split(state.params, phase.trains)

    def loss(trained, batch, key, extra):
      return phase.loss(optim.merge(trained, constant), batch, key, extra)

    method_key = jax.random.fold_in(key, METHOD)
    shared = parallel.share(loss, recipe.mesh)
    wrapped = recipe.method.wrap(shared, method_key, {}, hessian=phase.hessian)
    gradient = jax.value_and_grad(wrapped, has_aux=True)
    step_key = jax.random.fold_in(jax.random.fold_in(key, LOSS), state.step)
    (value, aux), grads = gradient(trained, batch, step_key, state.extra)
    updates, opt = optimizer.update(grads, state.opt[phase.name], trained)
    params = optim.merge(optax.apply_updates(trained, updates), constant)
    metrics = {**aux.metrics, "loss": value, "gradient_norm": optax.tree.norm(grads)}
    extra = jax.tree.map(jax.lax.stop_gradient, aux.extra)
    opt = {**state.opt, phase.name: opt}
    state = types.TrainState(state.step + 1, params, opt, extra, state.method)
    return state, metrics

  return step


def _advance(step: Callable) -> Callable:
  """`(state, sums, batch, key) -> (state, sums, finite)`: a step, its metrics added to `sums`."""

  def advance(state, sums, batch, key):
    state, metrics = step(state, batch, key)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
    return state, jax.tree.map(jnp.add, sums, metrics), finite

  return advance


def _compile(function: Callable, mesh: jax.sharding.Mesh | None) -> Callable:
  """Jitted; the first two arguments, state and sums, are consumed, all results are replicated."""
  return parallel.jit(function, mesh, donate_argnums=(0, 1))


def make_steps(
  step: Callable,
  batch_size: int,
  draws: int,
  *,
  mesh: jax.sharding.Mesh | None = None,
  together: bool = False,
) -> Callable:
  """Runs the steps [start, stop) of an epoch over data on the device, as one program.

  Args:
    step: from `make_step`.
    batch_size: B.
    draws: independent draws of B rows a step.
    mesh: as in `Recipe`.
    together: whether state, sums and key have a leading axis of runs that train side by side.

  Returns:
    A jitted `(state, sums, data, key, epoch, start, stop) -> (state, sums, last, finite)`:
    `data` is a whole split as one batch of N rows; `sums` accumulates the metrics; the bounds
    are traced, so that an epoch can be cut anywhere without compiling again or changing a bit.
    It ends at `last` < `stop` where a loss or gradient was not `finite`.
  """
  advance = _advance(step)

  def steps(state, sums, data, key, epoch, start, stop):
    orders = jax.vmap(lambda k: jax.random.permutation(k, data.index.shape[0]))(
      jax.random.split(_order_key(key, epoch), draws)
    )

    def unfinished(carry):
      _, _, at, finite = carry
      return (at < stop) & finite

    def body(carry):
      state, sums, at, _ = carry
      rows = jax.lax.dynamic_slice_in_dim(orders, at * batch_size, batch_size, axis=1)
      batch = jax.tree.map(lambda a: a[rows.reshape(-1)], data)
      state, sums, finite = advance(state, sums, batch, key)
      return state, sums, at + 1, finite

    state, sums, last, finite = jax.lax.while_loop(
      unfinished, body, (state, sums, start, jnp.bool_(True))
    )
    return state, sums, last, finite

  if together:
    steps = jax.vmap(steps, in_axes=(0, 0, None, 0, None, None, None))
  return _compile(steps, mesh)


def make_stream_steps(
  step: Callable, batch_size: int, draws: int, *, mesh: jax.sharding.Mesh | None = None
) -> Callable:
  """`make_steps` over data that stay on disk: `data` is a `stream.Stream`.

  A step is a program of its own, and the next batch is read while it runs.
  """
  advance = _advance(step)

  def one(state, sums, drawn, key):
    # stacked, as `meta` takes them apart again: rows that are concatenated would change devices
    join = lambda *parts: jnp.stack(parts).reshape(-1, *parts[0].shape[1:])  # noqa: E731
    batch = jax.tree.map(join, *drawn)
    return advance(state, sums, batch, key)

  one = _compile(one, mesh)
  place = batches = upcoming = None  # where the last call ended, and what follows there

  def steps(state, sums, data, key, epoch, start, stop):
    nonlocal place, batches, upcoming
    if place != (int(epoch), int(start)):
      read = data.batches(_order_key(key, epoch), batch_size, draws, skip=int(start))
      batches = (parallel.assemble(drawn, mesh) for drawn in read)
      upcoming = next(batches)
    at, finite = int(start), True
    while finite and at < stop:
      state, sums, found = one(state, sums, upcoming, key)
      at, upcoming = at + 1, next(batches, None)  # read while the device computes
      finite = bool(found)
    place = (int(epoch), at)
    return state, sums, at, finite

  return steps


def _order_key(key, epoch):
  return jax.random.fold_in(jax.random.fold_in(key, DATA), epoch)


def start(
  recipe: Recipe, train: types.Batch | stream.Stream, spec: types.Spec, key: types.PRNGKey
) -> Progress:
  """The progress of a run that has not begun; also the template to restore one into."""
  state = create(recipe, spec, key)
  example = train.example if isinstance(train, stream.Stream) else train
  batch_size = min(recipe.batch_size, spec.num_train)
  rows = np.arange(batch_size * recipe.method.draws) % example.index.shape[0]
  batch = jax.tree.map(lambda a: jnp.asarray(a[rows]), example)
  sums = {}
  for phase in recipe.system.phases:
    _, metrics = jax.eval_shape(make_step(recipe, phase), state, batch, key)
    sums[phase.name] = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics)
  # copies: the state's own buffers are donated to the first step
  best = _copy({"params": state.params, "extra": state.extra})
  worst, zero = np.float32(-np.inf), np.int32(0)
  others = {metric: {**_copy(best), "score": worst} for metric in recipe.also}
  progress = Progress(state, best, worst, np.int32(-1), others, zero, zero, zero, sums)
  return progress if recipe.mesh is None else parallel.replicate(progress, recipe.mesh)


def fit(
  recipe: Recipe,
  train: types.Batch | stream.Stream,
  validate: Callable[[types.Params, types.Extra], dict[str, float]],
  progress: Progress,
  key: types.PRNGKey,
  *,
  seconds: float = 10.0,
  pause: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[EpochReport]:
  """Trains epoch by epoch from `progress` on and yields a report after each.

  Each epoch runs its active phases in order, validates, and keeps the parameters that are
  best on validation, from the epoch on in which the last phase begins. Training is a
  function of (recipe, data, key) alone: where it was interrupted does not change a bit of the
  result.

  Args:
    recipe: how to train.
    train: the training split, N rows; a stream stays on disk.
    validate: `(params, extra) -> metrics` on the validation split, with `recipe.select`.
    progress: from `start` or a checkpoint. Its buffers are consumed.
    key: the run's key.
    seconds: long epochs are cut into stretches of about this time.
    pause: called between stretches with the current progress, to save it or to stop by
      raising an exception.

  Yields:
    An `EpochReport` per epoch.

  Raises:
    NonFiniteLoss: at the first step whose loss or gradient is not finite.
    KeyError: if `validate` does not return `recipe.select`.
  """
  phases, streamed = recipe.system.phases, isinstance(train, stream.Stream)
  rows = train.rows if streamed else train.index.shape[0]
  batch_size, make = min(recipe.batch_size, rows), make_stream_steps if streamed else make_steps
  runs = [
    make(make_step(recipe, phase), batch_size, recipe.method.draws, mesh=recipe.mesh)
    for phase in phases
  ]
  if recipe.mesh is not None:
    key = parallel.replicate(key, recipe.mesh)
  train = train if streamed else parallel.replicate(train, recipe.mesh)
  stretch = 1  # steps until the next pause; grows to about `seconds`

  while not _is_over(recipe, progress):
    epoch = int(progress.epoch)
    for number in range(int(progress.phase), len(phases)):
      phase, done = phases[number], int(progress.done)
      total = _phase_steps(phase, epoch, rows, batch_size)
      if done == 0 and total:
        progress = progress._replace(state=_on_epoch(phase, progress.state, epoch, train))
      while done < total:
        began = time.monotonic()
        bounds = (np.int32(done), np.int32(min(done + stretch, total)))
        state, sums, last, finite = runs[number](
          progress.state, progress.sums[phase.name], train, key, np.int32(epoch), *bounds
        )
        if not finite:
          raise NonFiniteLoss(phase.name, int(state.step) - 1)
        done = int(last)
        progress = progress._replace(
          state=state, done=np.int32(done), sums={**progress.sums, phase.name: sums}
        )
        took = parallel.agree(time.monotonic() - began)
        stretch = _next_stretch(stretch, took, seconds)
        if done < total:
          pause(progress)
      progress = progress._replace(phase=np.int32(number + 1), done=np.int32(0))
    valid = validate(*parallel.local((progress.state.params, progress.state.extra)))
    report = _finish_epoch(recipe, progress, valid, rows, batch_size)
    progress = report.progress
    yield report


def fit_together(
  recipe: Recipe,
  train: types.Batch,
  validates: Sequence[Callable[[types.Params, types.Extra], dict[str, float]]],
  progresses: Sequence[Progress],
  keys: Sequence[types.PRNGKey],
) -> Iterator[list[EpochReport | None]]:
  """`fit` for several seeds side by side, as one vmapped program: for accelerators.

  Args:
    recipe: how to train, the same for all.
    train: the training split.
    validates: of each run, see `fit`.
    progresses: of each run, all at the beginning of the same epoch. Consumed.
    keys: of each run.

  Yields:
    A report per run and epoch; None for a run that is over (patience).

  Raises:
    NonFiniteLoss: if one run's loss or gradient is not finite.
  """
  phases, rows = recipe.system.phases, train.index.shape[0]
  batch_size = min(recipe.batch_size, rows)
  runs = [
    make_steps(make_step(recipe, phase), batch_size, recipe.method.draws, together=True)
    for phase in phases
  ]
  train, keys, progresses = jax.tree.map(jnp.asarray, train), jnp.stack(keys), list(progresses)

  while not all(over := [_is_over(recipe, progress) for progress in progresses]):
    epoch = max(int(progress.epoch) for progress in progresses)
    for number, phase in enumerate(phases):
      if total := _phase_steps(phase, epoch, rows, batch_size):
        states = [_on_epoch(phase, progress.state, epoch, train) for progress in progresses]
        sums = [progress.sums[phase.name] for progress in progresses]
        states, sums, _, finite = runs[number](
          _stack(states), _stack(sums), train, keys, np.int32(epoch), np.int32(0), np.int32(total)
        )
        if not np.all(finite):
          raise NonFiniteLoss(phase.name, int(np.max(states.step)) - 1)
        progresses = [
          progress._replace(state=state, sums={**progress.sums, phase.name: sum_})
          for progress, state, sum_ in zip(
            progresses, _unstack(states), _unstack(sums), strict=True
          )
        ]
    reports = []
    for number, progress in enumerate(progresses):
      if over[number]:
        reports.append(None)
        continue
      valid = validates[number](progress.state.params, progress.state.extra)
      reports.append(_finish_epoch(recipe, progress, valid, rows, batch_size))
      progresses[number] = reports[-1].progress
    yield reports


@jax.jit
def _copy(tree):
  return jax.tree.map(jnp.copy, tree)


def _stack(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(tree):
  count = jax.tree.leaves(tree)[0].shape[0]
  return [jax.tree.map(lambda a, n=n: a[n], tree) for n in range(count)]


def total_steps(phase: types.Phase, epochs: int, rows: int, batch_size: int) -> int:
  """Steps that a phase runs in a whole training of `epochs`; what its schedules last."""
  batch_size = min(batch_size, rows)
  return sum(_phase_steps(phase, epoch, rows, batch_size) for epoch in range(epochs))


def _first_candidate(recipe: Recipe) -> int:
  """The first epoch that may be selected: before its last phase a model is not complete."""
  return min(recipe.system.phases[-1].epochs[0], recipe.epochs - 1)


def _is_over(recipe: Recipe, progress: Progress) -> bool:
  """Whether all epochs are done or the patience is at its end."""
  epoch = int(progress.epoch)
  best = max(int(progress.best_epoch), _first_candidate(recipe) - 1)
  patience = recipe.epochs if recipe.patience is None else recipe.patience
  return epoch >= recipe.epochs or epoch - 1 - best >= patience


def _finish_epoch(recipe, progress, valid, rows, batch_size) -> EpochReport:
  """Keeps the best parameters and sets the counters to the next epoch."""
  epoch = int(progress.epoch)
  means = _means(recipe.system.phases, progress.sums, epoch, rows, batch_size)
  score = valid[recipe.select] * (1.0 if recipe.larger_is_better else -1.0)
  candidate = epoch >= _first_candidate(recipe)
  is_best = candidate and score > float(progress.best_score)
  now = {"params": progress.state.params, "extra": progress.state.extra}
  others = dict(progress.others)
  for metric in recipe.also if candidate else ():
    own = valid[metric] * (-1.0 if metric in metrics.LOWER_IS_BETTER else 1.0)
    if own > float(others[metric]["score"]):
      others[metric] = {**_copy(now), "score": np.float32(own)}
  progress = progress._replace(others=others)
  if is_best:  # copies: the next step consumes the state's buffers
    progress = progress._replace(
      best=_copy(now),
      best_score=np.float32(score),
      best_epoch=np.int32(epoch),
    )
  opt = optim.observe(progress.state.opt, np.float32(score))
  progress = progress._replace(
    state=progress.state._replace(opt=opt),
    epoch=np.int32(epoch + 1),
    phase=np.int32(0),
    sums=jax.tree.map(jnp.zeros_like, progress.sums),
  )
  return EpochReport(epoch, means, valid, is_best, progress)


def _phase_steps(phase: types.Phase, epoch: int, rows: int, batch_size: int) -> int:
  """Steps of a phase in an epoch: its share of the full batches, at least one; 0 if inactive."""
  first, end = phase.epochs
  if epoch < first or (end is not None and epoch >= end):
    return 0
  return max(int(rows // batch_size * phase.share), 1)


def _next_stretch(stretch: int, took: float, seconds: float) -> int:
  if took < seconds / 2:
    return stretch * 4
  return max(stretch // 2, 1) if took > seconds * 2 else stretch


def _means(phases, sums, epoch, rows, batch_size) -> dict[str, float]:
  means = {}
  for phase in phases:
    prefix = f"{phase.name}/" if len(phases) > 1 else ""
    if total := _phase_steps(phase, epoch, rows, batch_size):
      means |= {prefix + k: float(v) / total for k, v in sums[phase.name].items()}
  return means


def _on_epoch(phase: types.Phase, state: types.TrainState, epoch: int, train) -> types.TrainState:
  """What happens to the state before a phase's steps of an epoch."""
  if phase.on_epoch is None:
    return state
  params, extra = phase.on_epoch(state.params, state.extra, epoch, train)
  return state._replace(params=params, extra=extra)
