import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import toy
from mmjax import checkpoint, masking, meta, optim, train, types

KEY = jax.random.key(5)
DATA = toy.make_batch(32)


def recipe(**kwargs):
  settings = dict(
    system=toy.make_system(),
    method=lambda key: functools.partial(meta.sampled_missing, mask=masking.span((0.2, 0.5))),
    optimizers={"main": optim.make(learning_rate=0.03)},
    batch_size=8,
    epochs=6,
  )
  return train.Recipe(**{**settings, **kwargs})


def validate(params, extra):
  prediction = toy.predict(params, DATA, extra)["prediction"]
  return {"mae": float(jnp.mean(jnp.abs(prediction - DATA.label)))}


def run(plan, progress=None, pause=lambda progress: None, seconds=10.0):
  progress = train.start(plan, DATA, toy.SPEC, KEY) if progress is None else progress
  return list(train.fit(plan, DATA, validate, progress, KEY, pause=pause, seconds=seconds))


class Killed(Exception):
  pass


@pytest.fixture(scope="module")
def finished():
  return run(recipe())


def test_it_learns_and_keeps_the_best_epoch(finished):
  assert finished[-1].valid["mae"] < 0.7 * finished[0].valid["mae"]
  last = finished[-1].progress
  best = min(range(len(finished)), key=lambda n: finished[n].valid["mae"])
  assert int(last.best_epoch) == best
  assert [r.is_best for r in finished][best]
  np.testing.assert_allclose(validate(**last.best)["mae"], finished[best].valid["mae"], rtol=1e-6)
  assert int(last.state.step) == 6 * 4 == int(last.state.extra["calls"])


@pytest.mark.parametrize("kill_at", [1, 3, 7])
def test_a_resumed_run_is_bit_identical(finished, tmp_path, kill_at):
  """Stopped at any step, saved, read back in a new process's place, and run to the end."""
  steps = checkpoint.manager(tmp_path)

  def pause(progress):
    if int(progress.state.step) >= kill_at:
      checkpoint.save(steps, int(progress.state.step), progress)
      raise Killed

  with pytest.raises(Killed):
    run(recipe(), pause=pause, seconds=0.0)  # seconds=0: a pause after every step
  progress = checkpoint.restore(steps, train.start(recipe(), DATA, toy.SPEC, KEY))
  assert int(progress.state.step) in (kill_at, kill_at + 1)  # no pause at the end of an epoch
  resumed = run(recipe(), progress)
  chex.assert_trees_all_equal(resumed[-1].progress, finished[-1].progress)
  assert [r.train for r in resumed[-2:]] == [r.train for r in finished[-2:]]


def test_m3s_trains_through_the_same_trainer():
  method = functools.partial(
    meta.m3s, mask=masking.span(0.5), inner_optimizer=optax.sgd(0.01), order="second"
  )
  reports = run(recipe(method=lambda key: method, draws=2))
  assert reports[-1].valid["mae"] < 0.7 * reports[0].valid["mae"]
  assert int(reports[-1].progress.state.extra["calls"]) == 6 * 4  # once a step
  assert "support_loss" in reports[-1].train


def test_every_draw_passes_the_data_once_an_epoch():
  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, {"calls": extra["calls"]})
    half = batch.index.shape[0] // 2
    visits = extra["visits"].at[0, batch.index[:half]].add(1).at[1, batch.index[half:]].add(1)
    return value, types.Aux(aux.metrics, {**aux.extra, "visits": visits})

  def init(key, spec):
    params, extra = toy.init(key, spec)
    return params, {**extra, "visits": jnp.zeros((2, 32), jnp.int32)}

  system = types.System(init, toy.predict, (types.Phase("main", loss),))
  plan = recipe(system=system, draws=2, epochs=3, method=lambda key: lambda loss: loss)
  np.testing.assert_array_equal(run(plan)[-1].progress.state.extra["visits"], np.full((2, 32), 3))


def test_phases_train_their_own_parameters_in_their_own_epochs():
  entered = []

  def enter(params, extra):
    entered.append(True)
    return {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}, extra

  phases = (
    types.Phase("encoder", toy.loss, trains="^encoder/", share=0.5),
    types.Phase("head", toy.loss, trains="^head/", epochs=(1, 2), enter=enter),
  )
  optimizers = {p.name: optim.make(learning_rate=0.01) for p in phases}
  plan = recipe(system=toy.make_system(phases=phases), optimizers=optimizers, epochs=3)
  first = jax.tree.map(np.asarray, train.start(plan, DATA, toy.SPEC, KEY).state.params)
  params, steps = [first], []
  for report in train.fit(plan, DATA, validate, train.start(plan, DATA, toy.SPEC, KEY), KEY):
    params.append(jax.tree.map(np.array, report.progress.state.params))
    steps.append(int(report.progress.state.step))
  chex.assert_trees_all_equal(params[1]["head"], first["head"])
  assert (params[1]["encoder"]["kernel"] != first["encoder"]["kernel"]).any()
  assert steps == [2, 2 + 2 + 4, 8 + 2]
  assert len(entered) == 1
  assert (params[2]["head"]["kernel"] != 0).all()
  chex.assert_trees_all_equal(params[3]["head"], params[2]["head"])


def test_a_loss_that_is_not_finite_stops_at_its_step():
  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, extra)
    return jnp.where(extra["calls"] == 5, jnp.nan, value), aux

  plan = recipe(system=toy.make_system(phases=(types.Phase("main", loss),)))
  with pytest.raises(train.NonFiniteLoss, match="step 5") as caught:
    run(plan)
  assert caught.value.step == 5


def test_seeds_side_by_side_equal_seeds_in_turn(finished):
  plan, keys = recipe(epochs=3), [KEY, jax.random.key(6)]
  progresses = [train.start(plan, DATA, toy.SPEC, key) for key in keys]
  alone = [r.valid["mae"] for r in finished[:3]]
  together = list(train.fit_together(plan, DATA, [validate] * 2, progresses, keys))
  np.testing.assert_allclose([r[0].valid["mae"] for r in together], alone, rtol=1e-4)
  assert together[-1][0].valid["mae"] != together[-1][1].valid["mae"]
  assert together[-1][1].progress.best_epoch == 2


def test_patience_stops_early():
  plan = recipe(patience=2, optimizers={"main": optim.make(learning_rate=0.0)}, epochs=50)
  assert len(run(plan)) == 3  # the first is the best, two without a better one


def test_more_rows_a_batch_than_data():
  report = run(recipe(batch_size=100, epochs=1))[-1]
  assert int(report.progress.state.step) == 1


def test_steps_are_compiled_once():
  traces = []

  def loss(params, batch, key, extra):
    traces.append(1)
    return toy.loss(params, batch, key, extra)

  plan = recipe(system=toy.make_system(phases=(types.Phase("main", loss),)))
  progress = train.start(plan, DATA, toy.SPEC, KEY)
  before = len(traces)
  run(plan, progress, seconds=0.0)
  assert len(traces) - before <= 2  # value_and_grad inside one jit


def test_the_steps_of_a_phase_are_counted_as_they_run():
  """37 rows in batches of 8: 4 steps an epoch, of which a half share runs 2."""
  phase = types.Phase("head", toy.loss, share=0.5, epochs=(1, 4))
  assert train.total_steps(phase, 10, 37, 8) == 3 * 2
  assert train.total_steps(phase, 2, 37, 8) == 2
  assert train.total_steps(types.Phase("all", toy.loss), 10, 5, 8) == 10  # one batch of 5


def test_a_plateau_follows_the_validation():
  scores = iter([1.0, 2.0, 2.0, 2.0, 2.0])
  plan = recipe(
    optimizers={"main": optim.make(learning_rate=0.01, plateau=dict(patience=1, factor=0.5))},
    epochs=5,
  )
  start = train.start(plan, DATA, toy.SPEC, KEY)
  scales = [
    float(report.progress.state.opt["main"][-1].scale)
    for report in train.fit(plan, DATA, lambda p, e: {"mae": next(scores)}, start, KEY)
  ]
  assert scales == [1.0, 1.0, 0.5, 0.5, 0.25]
