"""The one trainer: a step, and the fit loop around the steps of a source.

A training run is a pytree (`Progress`) and pure functions of it: saving that pytree and
loading it again continues the run bit for bit, in the middle of an epoch too.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import metrics, optim, parallel, registry, sources, types

# One constant per purpose, folded into the run's key.
INIT, DATA, LOSS, METHOD, METHOD_INIT = 0, sources.DATA, 2, 3, 4

Evaluators = Mapping[str, Callable[[types.Params, types.Extra], Mapping[str, float]]]


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
    optimizers: of each phase, by its name. Those that read `value`, `grad` or `value_fn` in
      their update get them.
    batch_size: B, samples of one draw; conversations, where the split is grouped in them.
    epochs: number of epochs; each passes every draw's permutation of the data once.
    select: "split/metric" names, each of which keeps the parameters of its own best epoch; the
      first one drives the patience and plateau schedules. `metrics.METRICS` tells in which
      direction a metric gets better: a metric of your own needs a row there.
    patience: stop after so many epochs without a better one (None: never).
    mesh: devices that share each batch, see `parallel`; None for one device.
  """

  system: types.System
  method: types.Method
  optimizers: Mapping[str, optax.GradientTransformation]
  batch_size: int
  epochs: int = 1
  select: tuple[str, ...] = ("valid/mae",)
  patience: int | None = None
  mesh: jax.sharding.Mesh | None = None


class Best(NamedTuple):
  """The best epoch by one metric.

  Attributes:
    score: [] the metric's value; infinitely bad before the first epoch.
    epoch: [] int32, -1 before the first.
    params, extra: of that epoch, the initial ones before the first.
  """

  score: Any
  epoch: Any
  params: types.Params
  extra: types.Extra


class Progress(NamedTuple):
  """Where a run stands.

  Attributes:
    state: parameters, optimizer states, extra.
    best: of each entry of `Recipe.select`.
    epoch, phase, done: [] int32, the epoch in progress, its phase and that phase's steps done.
    sums: metrics summed over the epoch's steps so far, by phase.
  """

  state: types.TrainState
  best: dict[str, Best]
  epoch: Any
  phase: Any
  done: Any
  sums: dict[str, dict[str, jax.Array]]


class EpochReport(NamedTuple):
  """One finished epoch.

  Attributes:
    epoch: its number, from 0.
    train: mean of each training metric, as "phase/metric" (no prefix with a single phase).
    evaluated: the metrics of each evaluator, by its name.
    improved: the entries of `Recipe.select` of which it is the best epoch so far.
    progress: where the run stands after it.
  """

  epoch: int
  train: dict[str, float]
  evaluated: dict[str, dict[str, float]]
  improved: tuple[str, ...]
  progress: Progress


def create(recipe: Recipe, spec: types.Spec, key: types.PRNGKey) -> types.TrainState:
  """Initial parameters, optimizer states, extra and method's parameters of a run."""
  params, extra = recipe.system.init(jax.random.fold_in(key, INIT), spec)

  @jax.jit  # one program, not one for each shape
  def init_phases(params, key):
    opt, own = {}, {}
    for number, phase in enumerate(recipe.system.phases):
      trained = optim.split(params, phase.trains)[0]
      if recipe.method.init is not None:
        if not isinstance(trained, Mapping) or "method" in trained:
          raise types.UsageError(
            "a method with parameters of its own trains a system whose parameters are a dict"
            ' without an entry "method".'
          )
        own[phase.name] = recipe.method.init(jax.random.fold_in(key, number), trained)
      tree = _joined(recipe.method, trained, own.get(phase.name))
      opt[phase.name] = optim.permissive(recipe.optimizers[phase.name]).init(tree)
    return opt, own

  opt, own = init_phases(params, jax.random.fold_in(key, METHOD_INIT))
  # steps consume the state's buffers, but what `init` returned belongs to the user; and neither
  # may one array stand in two places
  return _copy(types.TrainState(jnp.int32(0), params, opt, extra, own))


def _joined(method: types.Method, trained: types.Params, own: types.Params) -> types.Params:
  """The one tree that a phase's optimizer trains: the parameters, and the method's own."""
  return trained if method.init is None else {**trained, "method": own}


def _parted(method: types.Method, tree: types.Params) -> tuple[types.Params, types.Params]:
  """Inverse of `_joined`; {} where the method has no parameters."""
  if method.init is None:
    return tree, {}
  return {name: part for name, part in tree.items() if name != "method"}, tree["method"]


def make_step(
  recipe: Recipe, phase: types.Phase
) -> Callable[..., tuple[types.TrainState, dict[str, jax.Array]]]:
  """One optimizer step of a phase: `(state, batch, key) -> (state, metrics)`.

  `key` is the run's; the step folds `state.step` into it. Only the parameters that
  `phase.trains` finds are differentiated, in the inner loop of a meta-gradient too.
  """
  method = recipe.method
  optimizer = optim.permissive(recipe.optimizers[phase.name])

  def step(state, batch, key):
    trained, constant = optim.split(state.params, phase.trains)

    def loss(trained, batch, key, extra):
      return phase.loss(optim.merge(trained, constant), batch, key, extra)

    method_key = jax.random.fold_in(key, METHOD)
    shared = parallel.share(loss, recipe.mesh)

    def wrapped(tree, *args):
      trained, own = _parted(method, tree)
      return method.wrap(shared, method_key, own, hessian=phase.hessian)(trained, *args)

    tree = _joined(method, trained, state.method.get(phase.name))
    step_key = jax.random.fold_in(jax.random.fold_in(key, LOSS), state.step)
    gradient = jax.value_and_grad(wrapped, has_aux=True)
    (value, aux), grads = gradient(tree, batch, step_key, state.extra)

    def value_of(tree):  # of line searches
      return wrapped(tree, batch, step_key, state.extra)[0]

    updates, opt = optimizer.update(
      grads, state.opt[phase.name], tree, value=value, grad=grads, value_fn=value_of
    )
    trained, own = _parted(method, optax.apply_updates(tree, updates))
    own = state.method if method.init is None else {**state.method, phase.name: own}
    metrics = {**aux.metrics, "loss": value, "gradient_norm": optax.tree.norm(grads)}
    extra = jax.tree.map(jax.lax.stop_gradient, aux.extra)
    opt = {**state.opt, phase.name: opt}
    params = optim.merge(trained, constant)
    return types.TrainState(state.step + 1, params, opt, extra, own), metrics

  return step


def make_advance(recipe: Recipe, phase: types.Phase) -> sources.Advance:
  """`(state, sums, batch, key) -> (state, sums, finite)`: a step, its metrics added to `sums`."""
  step = make_step(recipe, phase)

  def advance(state, sums, batch, key):
    state, metrics = step(state, batch, key)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
    return state, jax.tree.map(jnp.add, sums, metrics), finite

  return advance


def start(
  recipe: Recipe, source: types.Batch | sources.Source, spec: types.Spec, key: types.PRNGKey
) -> Progress:
  """The progress of a run that has not begun; also the template to restore one into.

  Args:
    recipe: how to train.
    source: the training split.
    spec: its shapes, for `System.init`.
    key: the run's key.

  Raises:
    UsageError: if the recipe or the split cannot be trained with, see `fit`.
  """
  source = sources.as_source(source)
  _check_recipe(recipe, source)
  better = [_direction(name) for name in recipe.select]
  state = create(recipe, spec, key)
  batch = source.shapes(min(recipe.batch_size, source.rows) * recipe.method.draws)
  sums = {}
  for phase in recipe.system.phases:
    _, metrics = jax.eval_shape(make_step(recipe, phase), state, batch, key)
    sums[phase.name] = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics)
  zero = np.int32(0)
  best = {
    name: Best(np.float32(-sign * np.inf), np.int32(-1), *_copy((state.params, state.extra)))
    for name, sign in zip(recipe.select, better, strict=True)
  }
  progress = Progress(state, best, zero, zero, zero, sums)
  return progress if recipe.mesh is None else parallel.replicate(progress, recipe.mesh)


@overload
def fit(
  recipe: Recipe,
  source: types.Batch | sources.Source,
  evaluators: Evaluators,
  progress: Progress,
  key: types.PRNGKey,
  *,
  seconds: float = ...,
  pause: Callable[[Progress], None] = ...,
) -> Iterator[EpochReport]: ...


@overload
def fit(
  recipe: Recipe | Callable[[Any], Recipe],
  source: types.Batch | sources.Source,
  evaluators: Sequence[Evaluators],
  progress: Sequence[Progress],
  key: Sequence[types.PRNGKey],
  *,
  numbers: Sequence[Any] | None = ...,
  seconds: float = ...,
  pause: Callable[[list[Progress]], None] = ...,
) -> Iterator[list[EpochReport | None]]: ...


def fit(
  recipe,
  source,
  evaluators,
  progress,
  key,
  *,
  numbers=None,
  seconds=10.0,
  pause=lambda progress: None,
) -> Iterator:
  """Trains epoch by epoch from `progress` on and yields a report after each.

  Each epoch runs its active phases in order, evaluates, and keeps the parameters that are
  best by each entry of `recipe.select`, from the epoch on in which the last phase begins.
  Training is a function of (recipe, source, key) alone: where it was interrupted does not
  change a bit of the result.

  Several runs that differ in their keys train side by side, as one vmapped program, where
  `evaluators`, `progress` and `key` are lists; all runs that are not over stand at the same
  step. What is given to `pause` and yielded are lists then, too. They may also differ in numbers,
  such as rates and weights: `recipe` is then a function that makes the recipe of them.

  Args:
    recipe: how to train; of runs that differ in `numbers`, a function of one run's. It is called
      with each run's own, and in the steps with traced ones: a number on which a shape or a branch
      depends raises JAX's errors there.
    source: the training split, N rows: a batch, or a source such as `stream.Stream`.
    evaluators: by the name of a split, `(params, extra) -> metrics`. All are called after each
      epoch. One may tell the metrics that it gives by an attribute `names`; otherwise it is
      asked once before the first step.
    progress: from `start` or a checkpoint. Its buffers are consumed.
    key: the run's key.
    numbers: of each run, a tree of arrays, all of one structure.
    seconds: long epochs are cut into stretches of about this time.
    pause: called between stretches with the current progress, to save it or to stop by
      raising an exception.

  Returns:
    An iterator of an `EpochReport` per epoch; in a list, None stands for a run that is over.

  Raises:
    UsageError: before the first step, if the recipe or the split cannot be trained with: an
      unknown entry of `select`, no rows, a batch of less than one row, …
    NonFiniteLoss: at the first step whose loss or gradient is not finite.
  """
  source, one = sources.as_source(source), isinstance(evaluators, Mapping)
  evaluators, progresses, keys = (
    [part] if one else list(part) for part in (evaluators, progress, key)
  )
  if not len(evaluators) == len(progresses) == len(keys) > 0:
    raise types.UsageError("runs side by side need as many evaluators as progresses and keys.")
  if numbers is None:
    make, numbers = (lambda _: recipe), [()] * len(keys)
  else:
    make, numbers = recipe, list(numbers)
    if one or len(numbers) != len(keys):
      raise types.UsageError("numbers are of runs side by side, one tree of each.")
  recipes = [make(given) for given in numbers]
  for its, plan, where in zip(evaluators, recipes, progresses, strict=True):
    _check_recipe(plan, source)
    _check_select(plan, its, where)
  if not one and recipes[0].mesh is not None:
    raise types.UsageError("runs side by side train on one device: the recipe's mesh must be None.")
  if len({outline(plan) for plan in recipes}) > 1:
    raise types.UsageError("runs side by side have the same phases, batches, epochs and selection.")
  runs = (make, recipes, numbers, source, evaluators, progresses, keys, seconds)
  if not one:
    return _fit(*runs, pause, together=True)
  alone = _fit(*runs, lambda progresses: pause(progresses[0]), together=False)
  return (report for (report,) in alone)


def outline(recipe: Recipe) -> tuple:
  """What the loop around the steps reads of a recipe; runs side by side have the same."""
  phases = tuple((phase.name, phase.share, phase.epochs) for phase in recipe.system.phases)
  train = (recipe.batch_size, recipe.epochs, recipe.select, recipe.patience)
  return (*train, recipe.method.draws, phases)


def _make_advance(make, number) -> sources.Advance:
  """`make_advance` in phase `number` of the recipe of a run, whose numbers go with its state."""

  def advance(state, sums, batch, key):
    state, given = state
    recipe = make(given)
    step = make_advance(recipe, recipe.system.phases[number])
    state, sums, finite = step(state, sums, batch, key)
    return (state, given), sums, finite

  return advance


def _fit(make, recipes, numbers, source, evaluators, progresses, keys, seconds, pause, *, together):
  """`fit` of lists; one run alone is not vmapped."""
  recipe = recipes[0]
  phases, batch_size = recipe.system.phases, min(recipe.batch_size, source.rows)
  placed = source.place(recipe.mesh)
  programs = [
    placed.make_steps(
      _make_advance(make, number),
      batch_size,
      recipe.method.draws,
      mesh=recipe.mesh,
      together=together,
    )
    for number in range(len(phases))
  ]
  key = jnp.stack(keys) if together else parallel.replicate(keys[0], recipe.mesh)
  stretch = 1  # steps until the next pause; grows to about `seconds`

  while active := [n for n, progress in enumerate(progresses) if not _is_over(recipe, progress)]:
    first = progresses[active[0]]
    if len({_place(progresses[n]) for n in active}) > 1:
      raise types.UsageError("runs side by side must stand at the same step.")
    epoch = int(first.epoch)
    for number in range(int(first.phase), len(phases)):
      phase, done = phases[number], int(progresses[active[0]].done)
      total = _phase_steps(phase, epoch, source.rows, batch_size)
      if done == 0 and total and phase.on_epoch is not None:
        for n in active:
          own = recipes[n].system.phases[number]
          state = _on_epoch(own, progresses[n].state, epoch, source, recipe.mesh)
          progresses[n] = progresses[n]._replace(state=state)
      while done < total:
        began, stop = time.monotonic(), min(done + stretch, total)
        (state, _), sums, finite = programs[number](
          *_gather(progresses, numbers, phase.name, together),
          key,
          np.int32(epoch),
          np.int32(done),
          np.int32(stop),
        )
        states, sums = (_unstack(state), _unstack(sums)) if together else ([state], [sums])
        for n in active:  # a run that is over computes, but stays as it is
          if not np.ravel(finite)[n]:
            raise NonFiniteLoss(phase.name, int(states[n].step) - 1)
          progresses[n] = progresses[n]._replace(
            state=states[n],
            done=np.int32(stop),
            sums={**progresses[n].sums, phase.name: sums[n]},
          )
        done = stop
        took = parallel.agree(time.monotonic() - began)
        stretch = _next_stretch(stretch, took, seconds)
        if done < total:
          pause(list(progresses))
      for n in active:
        progresses[n] = progresses[n]._replace(phase=np.int32(number + 1), done=np.int32(0))
    reports: list[EpochReport | None] = [None] * len(progresses)
    for n in active:
      now = parallel.local((progresses[n].state.params, progresses[n].state.extra))
      evaluated = {name: dict(evaluate(*now)) for name, evaluate in evaluators[n].items()}
      report = _finish_epoch(recipe, progresses[n], evaluated, source.rows, batch_size)
      reports[n], progresses[n] = report, report.progress
    yield reports


def _gather(progresses, numbers, phase, together):
  """State, with numbers, and sums of the run, or of all runs along a leading axis."""
  states = [(progress.state, given) for progress, given in zip(progresses, numbers, strict=True)]
  sums = [progress.sums[phase] for progress in progresses]
  return (_stack(states), _stack(sums)) if together else (states[0], sums[0])


def _place(progress: Progress) -> tuple[int, int, int]:
  return int(progress.epoch), int(progress.phase), int(progress.done)


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


def _check_recipe(recipe: Recipe, source: sources.Source) -> None:
  if source.rows < 1:
    raise types.UsageError("the training split has no rows.")
  if recipe.batch_size < 1:
    raise types.UsageError(f"batch_size is {recipe.batch_size}, expected at least 1.")
  if recipe.epochs < 0:
    raise types.UsageError(f"epochs is {recipe.epochs}, expected at least 0.")
  if recipe.patience is not None and recipe.patience < 1:
    raise types.UsageError(f"patience is {recipe.patience}, expected at least 1, or None.")
  missing = [p.name for p in recipe.system.phases if p.name not in recipe.optimizers]
  if missing:
    raise types.UsageError(
      f"no optimizer for the phases {missing}; there are {sorted(recipe.optimizers)}."
    )
  if isinstance(recipe.select, str) or not recipe.select:
    raise types.UsageError(
      f'select is {recipe.select!r}, expected a tuple of names, such as ("valid/mae",).'
    )


def _check_select(recipe: Recipe, evaluators: Evaluators, progress: Progress) -> None:
  """Refuses what nothing evaluates, before it costs an epoch."""
  if set(recipe.select) != set(progress.best):
    raise types.UsageError(
      f"the progress is of a run that selects {sorted(progress.best)}, not {list(recipe.select)}."
    )
  there = []
  for split, evaluate in evaluators.items():
    found = getattr(evaluate, "names", None)
    if found is None:
      found = evaluate(*parallel.local((progress.state.params, progress.state.extra)))
    there += [f"{split}/{metric}" for metric in found]
  for name in recipe.select:
    if name not in there:
      raise types.UsageError(
        f"select {name!r} is not evaluated{registry.nearest(name, there)}; there are"
        f" {', '.join(there)}."
      )


def _direction(name: str) -> float:
  """1 where a larger value of "split/metric" is better, else -1."""
  split, slash, metric = name.partition("/")
  if not slash or not split:
    raise types.UsageError(f'select {name!r} is no "split/metric", such as "valid/mae".')
  try:
    return 1.0 if metrics.info(metric).better == "max" else -1.0
  except (KeyError, types.UsageError):
    raise types.UsageError(
      f"select {name!r}: there is no metric {metric!r}"
      f"{registry.nearest(metric, metrics.METRICS)}; there are {', '.join(metrics.METRICS)}. One of"
      " your own needs a row in metrics.METRICS, which tells whether more of it is better."
    ) from None


def _first_candidate(recipe: Recipe) -> int:
  """The first epoch that may be selected: before its last phase a model is not complete."""
  return min(recipe.system.phases[-1].epochs[0], recipe.epochs - 1)


def _is_over(recipe: Recipe, progress: Progress) -> bool:
  """Whether all epochs are done or the patience is at its end."""
  epoch = int(progress.epoch)
  best = max(int(progress.best[recipe.select[0]].epoch), _first_candidate(recipe) - 1)
  patience = recipe.epochs if recipe.patience is None else recipe.patience
  return epoch >= recipe.epochs or epoch - 1 - best >= patience


def _finish_epoch(recipe, progress, evaluated, rows, batch_size) -> EpochReport:
  """Keeps the best parameters and sets the counters to the next epoch."""
  epoch = int(progress.epoch)
  means = _means(recipe.system.phases, progress.sums, epoch, rows, batch_size)
  best, improved = dict(progress.best), []
  candidate = epoch >= _first_candidate(recipe)
  for name in recipe.select:
    score, sign = _score(evaluated, name), _direction(name)
    if candidate and sign * score > sign * best[name].score:  # a NaN is never better
      # copies: the next step consumes the state's buffers
      now = _copy((progress.state.params, progress.state.extra))
      best[name] = Best(score, np.int32(epoch), *now)
      improved.append(name)
  first = recipe.select[0]
  seen = np.float32(_direction(first) * _score(evaluated, first))
  progress = progress._replace(
    state=progress.state._replace(opt=optim.observe(progress.state.opt, seen)),
    best=best,
    epoch=np.int32(epoch + 1),
    phase=np.int32(0),
    sums=jax.tree.map(jnp.zeros_like, progress.sums),
  )
  return EpochReport(epoch, means, evaluated, tuple(improved), progress)


def _score(evaluated, name) -> np.float32:
  """In the precision in which the best one is kept: an equal score is no better one."""
  split, _, metric = name.partition("/")
  return np.float32(evaluated[split][metric])


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


def _on_epoch(phase, state, epoch, source, mesh) -> types.TrainState:
  """What happens to the state before a phase's steps of an epoch."""
  changed = phase.on_epoch(state.params, state.extra, epoch, source)
  # copies: an array of the phase's own would be consumed with the state
  params, extra = _copy(parallel.replicate(changed, mesh))
  return state._replace(params=params, extra=extra)
