import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import toy
from mmjax import checkpoint, losses, masking, meta, metrics, optim, parallel, sources, train, types

KEY = jax.random.key(5)
DATA = toy.make_batch(32)


def recipe(**kwargs):
  settings = dict(
    system=toy.make_system(),
    method=meta.METHODS["spl"](masking.span((0.2, 0.5))),
    optimizers={"main": optim.make(learning_rate=0.03)},
    batch_size=8,
    epochs=6,
  )
  return train.Recipe(**{**settings, **kwargs})


def validate(params, extra):
  prediction = toy.predict(params, DATA, extra)["prediction"]
  return {"mae": float(jnp.mean(jnp.abs(prediction - DATA.label)))}


def run(plan, progress=None, evaluators=None, data=DATA, key=KEY, **kwargs):
  progress = train.start(plan, data, toy.SPEC, key) if progress is None else progress
  return list(train.fit(plan, data, evaluators or {"valid": validate}, progress, key, **kwargs))


def maes(reports):
  return [report.evaluated["valid"]["mae"] for report in reports]


def scores(*values, metric="mae"):
  """An evaluator that returns these values in turn."""
  values = iter(values)
  evaluate = lambda params, extra: {metric: next(values)}  # noqa: E731
  evaluate.names = (metric,)
  return evaluate


def described(progress):
  """Of each leaf what a program is compiled for; also that it is an array, as they are saved."""
  weak = lambda a: getattr(a, "weak_type", False)  # noqa: E731
  return jax.tree.map(lambda a: f"{a.dtype}{a.shape}{weak(a)}", progress)


class Killed(Exception):
  pass


@pytest.fixture(scope="module")
def finished():
  return run(recipe())


def test_it_learns_and_keeps_the_best_epoch(finished):
  found, last = maes(finished), finished[-1].progress
  assert found[-1] < 0.7 * found[0]
  best, at = last.best["valid/mae"], int(np.argmin(found))
  assert int(best.epoch) == at and best.score == np.float32(found[at])
  assert finished[at].improved == ("valid/mae",)
  np.testing.assert_allclose(validate(best.params, best.extra)["mae"], found[at], rtol=1e-6)
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
  method = meta.METHODS["m3s"](
    masking.span(0.5), order="second", optimizer=dict(name="sgd", learning_rate=0.01)
  )
  reports = run(recipe(method=method))
  assert maes(reports)[-1] < 0.7 * maes(reports)[0]
  assert int(reports[-1].progress.state.extra["calls"]) == 6 * 4  # once a step
  assert "support_loss" in reports[-1].train


def visited(epochs=3):
  """[epochs, 2 draws, 4 steps, 8 rows] the rows of every step, and whether keys differ."""

  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, {"calls": extra["calls"]})
    rows = extra["rows"].at[extra["calls"]].set(batch.index.reshape(2, 8))
    keys = extra["keys"].at[extra["calls"]].set(jax.random.bits(key))
    return value, types.Aux(aux.metrics, {**aux.extra, "rows": rows, "keys": keys})

  def init(key, spec):
    params, extra = toy.init(key, spec)
    rows = jnp.zeros((epochs * 4, 2, 8), jnp.int32)
    return params, {**extra, "rows": rows, "keys": jnp.zeros(epochs * 4, jnp.uint32)}

  system = types.System(init, toy.predict, (types.Phase("main", loss),))
  plain = types.Method(2, lambda loss, key, own, *, hessian="reverse": loss)
  extra = run(recipe(system=system, epochs=epochs, method=plain))[-1].progress.state.extra
  rows = np.asarray(extra["rows"]).reshape(epochs, 4, 2, 8).swapaxes(1, 2)
  return rows, np.asarray(extra["keys"])


def test_every_draw_passes_the_data_once_an_epoch_in_an_order_of_its_own():
  rows, keys = visited()
  passes = rows.reshape(-1, 32)  # of each epoch and draw
  np.testing.assert_array_equal(np.sort(passes), np.tile(np.arange(32), (6, 1)))
  assert len({tuple(one) for one in passes}) == 6
  assert len(set(keys)) == len(keys)  # each step has its own


def test_the_orders_are_those_of_the_key():
  """Written down: a change of the derivation would change every published number."""
  key = jax.random.fold_in(jax.random.fold_in(KEY, 1), 2)
  expected = [jax.random.permutation(k, 32) for k in jax.random.split(key, 2)]
  rows, _ = visited()
  np.testing.assert_array_equal(rows[2].reshape(2, 32), expected)


def test_phases_train_their_own_parameters_in_their_own_epochs():
  entered = []

  def on_epoch(params, extra, epoch, source):
    assert type(epoch) is int
    entered.append((epoch, source.rows, source.read().index.shape))
    return {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}, extra

  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, extra)
    return value, aux._replace(metrics={"two": jnp.float32(2.0)})

  phases = (
    types.Phase("encoder", loss, trains="^encoder/", share=0.5),
    types.Phase("head", loss, trains="^head/", epochs=(1, 2), on_epoch=on_epoch),
  )
  optimizers = {p.name: optim.make(learning_rate=0.01) for p in phases}
  plan = recipe(system=toy.make_system(phases=phases), optimizers=optimizers, epochs=3)
  begin = train.start(plan, DATA, toy.SPEC, KEY)
  params, steps, best, means = [jax.tree.map(np.array, begin.state.params)], [], [], []
  for report in train.fit(plan, DATA, {"valid": validate}, begin, KEY):
    params.append(jax.tree.map(np.array, report.progress.state.params))
    steps.append(int(report.progress.state.step))
    best.append(int(report.progress.best["valid/mae"].epoch))
    means.append({name: value for name, value in report.train.items() if "two" in name})
    assert all(type(value) is float for value in report.train.values())
  chex.assert_trees_all_equal(params[1]["head"], params[0]["head"])
  assert (params[1]["encoder"]["kernel"] != params[0]["encoder"]["kernel"]).any()
  assert steps == [2, 2 + 2 + 4, 8 + 2]
  assert entered == [(1, 32, (32,))]
  assert (params[2]["head"]["kernel"] != 0).all()
  assert (abs(params[2]["head"]["kernel"]) < 0.05).all()  # four steps of 0.01, from 0
  chex.assert_trees_all_equal(params[3]["head"], params[2]["head"])
  assert best[0] == -1 and best[1] == 1  # nothing is selected before the last phase
  assert means == [
    {"encoder/two": 2.0},
    {"encoder/two": 2.0, "head/two": 2.0},
    {"encoder/two": 2.0},
  ]


def test_what_a_phase_sets_each_epoch_stays_its_own():
  """An array that `on_epoch` returns again and again, twice at once, is not consumed."""
  shared = jnp.arange(3.0)

  def init(key, spec):
    params, extra = toy.init(key, spec)
    return params, {**extra, "a": shared, "b": shared}

  entered, caught = [], []

  def on_epoch(params, extra, epoch, source):
    entered.append(epoch)
    return params, {**extra, "a": shared, "b": shared}

  def pause(progress):
    caught.append(progress)
    raise Killed

  system = types.System(init, toy.predict, (types.Phase("main", toy.loss, on_epoch=on_epoch),))
  plan = recipe(system=system, epochs=2)
  with pytest.raises(Killed):
    run(plan, pause=pause)
  run(plan, *caught)
  assert float(shared.sum()) == 3
  assert entered == [0, 1]  # and not once more where a run goes on in the middle


def test_arrays_of_init_survive():
  """Pretrained weights belong to the user, and one array may stand in two places."""
  params, extra = toy.init(KEY, toy.SPEC)
  params["head"]["kernel"] = jnp.ones(8)
  params["encoder"]["again"] = params["head"]["kernel"]
  extra["ones"] = params["head"]["kernel"]
  # optimizers may hold the parameters themselves
  optimizer = optax.GradientTransformation(
    lambda params: params, lambda updates, state, params: (updates, state)
  )
  system = toy.make_system()._replace(init=lambda key, spec: (params, extra))
  for _ in range(2):
    run(recipe(system=system, epochs=1, optimizers={"main": optimizer}))
  assert float(params["encoder"]["again"].sum()) == 8 and int(extra["calls"]) == 0


def test_a_loss_that_is_not_finite_stops_at_its_step():
  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, extra)
    return jnp.where(extra["calls"] == 5, jnp.nan, value), aux

  plan = recipe(system=toy.make_system(phases=(types.Phase("main", loss),)))
  with pytest.raises(train.NonFiniteLoss, match="step 5") as caught:
    run(plan)
  assert caught.value.step == 5


def test_a_gradient_that_is_not_finite_stops_too():
  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, extra)
    return value + jnp.sqrt(jnp.abs(jax.lax.stop_gradient(value) * params["head"]["bias"])), aux

  plan = recipe(system=toy.make_system(phases=(types.Phase("main", loss),)))
  with pytest.raises(train.NonFiniteLoss, match="step 0"):
    run(plan)


def test_runs_side_by_side_equal_runs_in_turn(finished):
  """And they pause and go on in the middle of an epoch, and stop one by one."""
  plan, keys = recipe(epochs=3, patience=1), [KEY, jax.random.key(6)]
  late = [{"valid": scores(3.0, 2.0, 1.0)}, {"valid": scores(1.0, 2.0)}]
  paused = []

  def pause(progresses):
    paused.append([int(progress.done) for progress in progresses])

  def fit(evaluators, progresses=None, **kwargs):
    progresses = progresses or [train.start(plan, DATA, toy.SPEC, key) for key in keys]
    progresses = jax.tree.map(jnp.asarray, progresses)  # as they may be read back
    return list(train.fit(plan, DATA, evaluators, progresses, keys, **kwargs))

  reports = fit(late, pause=pause, seconds=0.0)
  assert [[r is None for r in both] for both in reports] == [
    [False] * 2,
    [False] * 2,
    [False, True],
  ]
  assert paused == [[n, n] for n in (1, 2, 3)] * 2 + [[n, 0] for n in (1, 2, 3)]
  for (report, _), alone in zip(reports, finished, strict=False):
    np.testing.assert_allclose(report.train["loss"], alone.train["loss"], rtol=1e-4)
  other = run(recipe(epochs=2), train.start(plan, DATA, toy.SPEC, keys[1]), key=keys[1])
  np.testing.assert_allclose(reports[1][1].train["loss"], other[-1].train["loss"], rtol=1e-4)


def test_a_run_that_is_over_keeps_its_state_beside_another():
  plan, keys = recipe(epochs=3, patience=1), [KEY, jax.random.key(6)]
  evaluators = [{"valid": scores(3.0, 2.0, 1.0)}, {"valid": scores(1.0, 2.0)}]
  progresses = [train.start(plan, DATA, toy.SPEC, key) for key in keys]
  seen = []
  pause = lambda both: seen.append(jax.tree.map(np.array, both[1].state.params))  # noqa: E731
  reports = list(train.fit(plan, DATA, evaluators, progresses, keys, seconds=0.0, pause=pause))
  chex.assert_trees_all_equal(seen[-1], reports[1][1].progress.state.params)


def of_numbers(given):
  """A recipe of rates and a weight; the outer optimizer has a schedule, and decay of its own."""
  schedule = {"name": "cosine", "peak": given["rate"]}
  inner = {"name": "adam", "learning_rate": given["inner"]}
  outer = dict(name="adamw", learning_rate=schedule, weight_decay=given["decay"])
  loss = losses.with_l2(toy.loss, given["weight"])
  return recipe(
    system=toy.make_system(phases=(types.Phase("main", loss),)),
    method=meta.METHODS["m3s"](masking.span((0.0, given["missing"])), optimizer=inner),
    optimizers={"main": optim.make(total_steps=8, **outer)},
    epochs=2,
  )


def test_runs_that_differ_in_numbers_side_by_side_equal_runs_in_turn():
  names = ("rate", "inner", "decay", "weight", "missing")
  values = ((0.03, 0.01, 0.0, 0.0, 0.2), (0.1, 0.1, 0.1, 0.5, 0.9))
  numbers = [dict(zip(names, np.float32(one), strict=True)) for one in values]
  plans, keys = [of_numbers(given) for given in numbers], [KEY, jax.random.key(6)]
  begin = [train.start(p, DATA, toy.SPEC, key) for p, key in zip(plans, keys, strict=True)]
  evaluators = [{"valid": validate}] * 2
  found = list(train.fit(of_numbers, DATA, evaluators, begin, keys, numbers=numbers))
  for n, (plan, key) in enumerate(zip(plans, keys, strict=True)):
    alone = run(plan, key=key)
    assert maes(one[n] for one in found) == pytest.approx(maes(alone), rel=1e-4)
    params = found[-1][n].progress.state.params
    chex.assert_trees_all_close(params, alone[-1].progress.state.params, rtol=1e-3, atol=1e-6)
  assert abs(found[-1][0].train["loss"] - found[-1][1].train["loss"]) > 0.1

  def branches(given):
    return recipe(epochs=2 if given["rate"] > 0.05 else 3)

  begin = [train.start(branches(given), DATA, toy.SPEC, KEY) for given in numbers]
  with pytest.raises(types.UsageError, match="same phases, batches, epochs"):
    train.fit(branches, DATA, evaluators, begin, keys, numbers=numbers)


def test_patience_stops_early():
  plan = recipe(patience=2, epochs=50)
  found = run(plan, evaluators={"valid": scores(3.0, 2.0, 2.0, 2.5)})
  assert len(found) == 4  # the second is the best, two without a better one


def test_each_metric_selects_its_own_epoch_in_its_own_direction():
  """The first one drives the patience; NaN is never better."""
  nan, select = float("nan"), ("valid/mae", "test/acc", "test/mae")
  valid, test = scores(nan, 3.0, 4.0, 2.0), lambda params, extra: next(both)
  test.names = ("mae", "acc")
  both = iter([dict(mae=m, acc=a) for m, a in ((1.0, 0.2), (2.0, 0.6), (nan, nan), (3.0, 0.5))])
  reports = run(recipe(select=select, epochs=4), evaluators={"valid": valid, "test": test})
  best = reports[-1].progress.best
  assert {name: (float(b.score), int(b.epoch)) for name, b in best.items()} == {
    "valid/mae": (2.0, 3),
    "test/acc": (np.float32(0.6), 1),
    "test/mae": (1.0, 0),
  }
  assert [set(r.improved) for r in reports] == [
    {"test/acc", "test/mae"},
    {"valid/mae", "test/acc"},
    set(),
    {"valid/mae"},
  ]
  chex.assert_trees_all_equal(best["valid/mae"].params, reports[-1].progress.state.params)
  assert int(best["test/acc"].extra["calls"]) == 8  # of that epoch
  # what was reported stays
  assert [int(r.progress.best["valid/mae"].epoch) for r in reports] == [-1, 1, 1, 3]
  assert reports[0].progress.best["valid/mae"].score == np.inf
  assert [r.evaluated["valid"]["mae"] for r in reports[1:]] == [3.0, 4.0, 2.0]


def test_an_equal_score_is_no_better_one():
  """Though 0.7 is more than float32(0.7), as which it is kept."""
  plan = recipe(select=("valid/acc",), epochs=2)
  reports = run(plan, evaluators={"valid": scores(0.7, 0.7, metric="acc")})
  assert [r.improved for r in reports] == [("valid/acc",), ()]


def test_nothing_is_selected_and_no_patience_lost_before_the_last_phase():
  system = toy.make_system(phases=(types.Phase("main", toy.loss, epochs=(2, None)),))
  plan = recipe(system=system, patience=1, epochs=5)
  nan = float("nan")
  for values, improved in (
    ((1.0, 1.0, 3.0, 4.0), [False, False, True, False]),
    ((1.0, 1.0, nan), [False] * 3),
  ):
    reports = run(plan, evaluators={"valid": scores(*values)})
    assert [bool(r.improved) for r in reports] == improved
  short = run(plan._replace(epochs=2), evaluators={"valid": scores(2.0, 3.0)})
  assert int(short[-1].progress.best["valid/mae"].epoch) == 1  # it ends before that phase: the last


def test_stretches_grow_and_shrink_to_the_seconds_asked_for(monkeypatch):
  took, paused = iter([4.9, 5.0, 20.0, 20.1, 21.0, 21.0, 0.0, *[10.0] * 9]), []

  def agree(seconds):
    assert 0 <= seconds < 100
    return next(took)

  monkeypatch.setattr(parallel, "agree", agree)
  plan = recipe(batch_size=1, epochs=1)
  begin = train.start(plan, DATA, toy.SPEC, KEY)
  (report,) = run(plan, begin, pause=paused.append)
  assert [int(progress.done) for progress in paused] == [1, 5, 9, 13, 15, 16, 17, 21, 25, 29]
  for progress in (paused[0], report.progress):
    assert described(progress) == described(begin)
  assert type(report.epoch) is int


def test_an_evaluator_reads_arrays_of_this_process(monkeypatch):
  monkeypatch.setattr(parallel, "local", lambda tree: jax.tree.map(np.asarray, tree))
  asked, answer = [], {}

  def evaluate(params, extra):
    asked.extend(jax.tree.leaves((params, extra)))
    answer["mae"] = float(len(asked))
    return answer

  reports = run(recipe(epochs=2), evaluators={"valid": evaluate})
  assert len(asked) == 3 * 4 and all(isinstance(leaf, np.ndarray) for leaf in asked)
  assert maes(reports) == [8.0, 12.0]  # copies of the evaluator's answers


@pytest.mark.parametrize(
  "changed, message",
  [
    (dict(select=("valid/mea",)), "no metric 'mea' .did you mean 'mae'.*there are .*corr"),
    (dict(select=("test/mae",)), "'test/mae' is not evaluated.*there are valid/mae"),
    (dict(select=("valid/corr",)), "'valid/corr' is not evaluated.*there are valid/mae"),
    (dict(select=("mae",)), 'no "split/metric"'),
    (dict(select="valid/mae"), "expected a tuple"),
    (dict(select=()), "expected a tuple"),
    (dict(select=("valid/mine",)), "no metric 'mine'.*needs a row"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(epochs=-1), "epochs is -1"),
    (dict(patience=0), "patience is 0"),
    (dict(optimizers={"other": optax.sgd(0.1)}), "no optimizer for the phases \\['main'\\]"),
  ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(changed, message):
  calls = []

  def loss(params, batch, key, extra):
    jax.debug.callback(lambda: calls.append(1))
    return toy.loss(params, batch, key, extra)

  plan = recipe(system=toy.make_system(phases=(types.Phase("main", loss),)), **changed)
  with pytest.raises(types.UsageError, match=message):
    run(plan)
  with pytest.raises(types.UsageError, match=f"{message}|progress is of a run that selects"):
    train.fit(plan, DATA, {"valid": validate}, train.start(recipe(), DATA, toy.SPEC, KEY), KEY)
  assert not calls


def test_the_least_that_can_be_trained():
  """One row, batches of one, a patience of one; or no epoch at all."""
  one = jax.tree.map(lambda a: a[:1], DATA)
  plan = recipe(batch_size=1, epochs=0, patience=1)
  train.start(plan._replace(epochs=1), one, toy.SPEC, KEY)
  assert run(plan, data=one) == []


def test_runs_that_cannot_train_side_by_side_are_refused():
  begin, both = train.start(recipe(), DATA, toy.SPEC, KEY), [{"valid": scores(1.0)}] * 2
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
  for plan, evaluators, progresses, keys, message in (
    (recipe(), both, [begin] * 2, [KEY], "as many"),
    (recipe(), both, [begin], [KEY] * 2, "as many"),
    (recipe(), [], [], [], "as many"),
    (recipe(mesh=mesh), both, [begin] * 2, [KEY] * 2, "one device"),
    (recipe(), both, [begin, begin._replace(done=np.int32(1))], [KEY] * 2, "same step"),
    (recipe(), both, [begin, begin._replace(epoch=np.int32(1))], [KEY] * 2, "same step"),
  ):
    with pytest.raises(types.UsageError, match=message):
      next(train.fit(plan, DATA, evaluators, progresses, keys))
  train.fit(recipe(), DATA, both[:1], [begin], [KEY])  # one alone is none of these


def test_an_empty_split_is_refused():
  empty = jax.tree.map(lambda a: a[:0], DATA)
  with pytest.raises(types.UsageError, match="no rows"):
    train.start(recipe(), empty, toy.SPEC, KEY)


def test_a_metric_of_ones_own_is_selected_once_it_has_a_row(monkeypatch):
  monkeypatch.setitem(metrics.METRICS, "mine", metrics.METRICS["corr"])
  plan = recipe(select=("valid/mine",), epochs=3)
  found = run(plan, evaluators={"valid": scores(0.1, 0.3, 0.2, metric="mine")})
  assert int(found[-1].progress.best["valid/mine"].epoch) == 1


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
  # their memory is used again
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((progress.state, progress.sums)))


def test_the_steps_of_a_phase_are_counted_as_they_run():
  """37 rows in batches of 8: 4 steps an epoch, of which a half share runs 2."""
  phase = types.Phase("head", toy.loss, share=0.5, epochs=(1, 4))
  assert train.total_steps(phase, 10, 37, 8) == 3 * 2
  assert train.total_steps(phase, 2, 37, 8) == 2
  assert train.total_steps(phase._replace(share=0.4), 10, 37, 8) == 3 * 1
  assert train.total_steps(phase._replace(share=0.01), 10, 37, 8) == 3 * 1
  assert train.total_steps(types.Phase("all", toy.loss), 10, 5, 8) == 10  # one batch of 5


def test_a_plateau_follows_the_first_selected_metric():
  plan = recipe(
    optimizers={"main": optim.make(learning_rate=0.01, plateau=dict(patience=1, factor=0.5))},
    epochs=5,
  )
  begin = train.start(plan, DATA, toy.SPEC, KEY)
  evaluators = {"valid": scores(1.0, 2.0, 2.0, 2.0, 2.0)}
  scales = [
    float(report.progress.state.opt["main"][-1].scale)
    for report in train.fit(plan, DATA, evaluators, begin, KEY)
  ]
  assert scales == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_an_optimizer_and_a_method_get_what_they_may_read():
  """Loss, gradient and a value function; the loss's Hessian mode. Neither minds promotion."""
  read = {}

  def update(grads, state, params, *, value, grad, value_fn):
    shifted = jax.tree.map(lambda p: p + 0.5, params)
    read["update"] = state * jnp.int32(2), value, grads, grad, value_fn(shifted), shifted
    return jax.tree.map(lambda g: -jnp.int32(1) * g, grads), state

  def wrap(loss, key, own, *, hessian="reverse"):
    read["wrap"] = hessian, key, own
    return loss

  optimizer = optax.GradientTransformationExtraArgs(
    lambda params: jnp.int32(1) * jnp.float32(0.5), update
  )
  phase = types.Phase("main", toy.loss, hessian="symmetric")
  plan = recipe(
    system=toy.make_system(phases=(phase,)),
    method=types.Method(1, wrap),
    optimizers={"main": optimizer},
  )
  begin = train.start(plan, DATA, toy.SPEC, KEY).state
  state, found = train.make_step(plan, phase)(begin, DATA, KEY)
  key = jax.random.fold_in(jax.random.fold_in(KEY, 2), 0)
  loss = lambda params: toy.loss(params, DATA, key, begin.extra)[0]  # noqa: E731
  expected, gradient = jax.value_and_grad(loss)(begin.params)
  twice, value, *gradients, of_shifted, shifted = read["update"]
  assert (float(twice), value) == (1.0, expected) and of_shifted == loss(shifted)
  chex.assert_trees_all_equal(*gradients, gradient)
  moved = jax.tree.map(lambda p, g: p - g, begin.params, gradient)
  chex.assert_trees_all_equal(state.params, moved)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(found["gradient_norm"], norm, rtol=1e-6)
  assert found["loss"] == expected and read["wrap"][::2] == ("symmetric", {})
  assert read["wrap"][1] == jax.random.fold_in(KEY, 3)


def rated(first=0.5):
  """A method with a parameter of its own: the loss is multiplied by `rate`, plus (rate - 2)²."""

  def init(key, params):
    assert set(params) == {"head", "encoder"}
    return {"rate": first + jax.random.uniform(key)}

  def wrap(loss, key, own, *, hessian="reverse"):
    def wrapped(params, batch, key, extra):
      value, aux = loss(params, batch, key, extra)
      return jax.lax.stop_gradient(own["rate"]) * value + (own["rate"] - 2.0) ** 2, aux

    return wrapped

  return types.Method(1, wrap, init)


def test_a_method_trains_parameters_of_its_own(tmp_path):
  groups = (("^method/", dict(learning_rate=0.1)),)
  optimizers = {"main": optim.make(name="sgd", learning_rate=0.0, groups=groups)}
  plan = recipe(method=rated(), optimizers=optimizers, epochs=1)
  begin = train.start(plan, DATA, toy.SPEC, KEY)
  plain = train.start(recipe(), DATA, toy.SPEC, KEY)
  chex.assert_trees_all_equal(begin.state.params, plain.state.params)  # nothing else moves
  first, params = (
    float(begin.state.method["main"]["rate"]),
    jax.tree.map(np.array, begin.state.params),
  )
  assert 0.5 < first < 1.5
  steps = checkpoint.manager(tmp_path)
  checkpoint.save(steps, 0, begin)
  last = run(plan, begin)[-1].progress.state
  # sgd on (rate - 2)²: rate - 2 shrinks by 1 - 2 * 0.1 a step
  expected = 2 + (first - 2) * 0.8**4
  np.testing.assert_allclose(float(last.method["main"]["rate"]), expected, rtol=1e-5)
  chex.assert_trees_all_equal(last.params, params)  # its group alone has a rate
  again = run(plan, checkpoint.restore(steps, train.start(plan, DATA, toy.SPEC, KEY)))
  chex.assert_trees_all_equal(again[-1].progress.state, last)
  others = {
    float(train.start(plan, DATA, toy.SPEC, jax.random.key(n)).state.method["main"]["rate"])
    for n in (1, 2)
  }
  assert len(others) == 2


def test_parameters_named_method_are_refused():
  system = toy.make_system()._replace(init=lambda key, spec: ({"method": jnp.ones(2)}, {}))
  with pytest.raises(types.UsageError, match='without an entry "method"'):
    train.start(recipe(method=rated(), system=system), DATA, toy.SPEC, KEY)
  system = system._replace(init=lambda key, spec: ([jnp.ones(2)], {}))
  with pytest.raises(types.UsageError, match="whose parameters are a dict"):
    train.start(recipe(method=rated(), system=system), DATA, toy.SPEC, KEY)


def test_a_batch_and_its_source_are_the_same(finished):
  wide = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, DATA)
  for data in (sources.Resident(DATA), wide):
    assert run(recipe(epochs=1), data=data)[0].train == finished[0].train


def test_steps_pass_their_rows_from_anywhere_to_anywhere():
  """As a loop of one's own may call them."""
  key = jax.random.key(4)

  def advance(state, sums, batch, key):
    at, rows = state
    return (at + 1, rows.at[at].set(batch.index)), sums, jnp.bool_(True)

  def run(steps, *bounds):
    state = jnp.int32(bounds[0]), jnp.full((4, 12), -1)
    return np.asarray(steps(state, {}, key, 7, *bounds)[0][1])

  steps = sources.Resident(DATA).make_steps(advance, 6, 2)
  orders = [
    jax.random.permutation(k, 32)[:24].reshape(4, 6)
    for k in jax.random.split(sources.order_key(key, 7), 2)
  ]
  expected = np.concatenate(orders, 1)
  np.testing.assert_array_equal(run(steps, 0, 4), expected)
  np.testing.assert_array_equal(run(steps, 1, 3)[1:3], expected[1:3])
  assert (run(steps, 1, 3)[[0, 3]] == -1).all()


def test_a_source_is_placed_on_the_mesh_that_shares_its_batches(finished):
  called = []

  class Source(sources.Resident):
    def place(self, mesh):
      called.append(mesh)
      return Source(super().place(mesh).batch)

    def make_steps(self, *args, **kwargs):
      called.append((kwargs, {leaf.sharding for leaf in jax.tree.leaves(self.batch)}))
      return super().make_steps(*args, **kwargs)

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
  (report,) = run(recipe(epochs=1, mesh=mesh), data=Source(DATA))
  held = parallel.replicated(mesh)
  assert called == [mesh, (dict(mesh=mesh, together=False), {held})]
  assert {leaf.sharding for leaf in jax.tree.leaves(report.progress.state.params)} == {held}
  np.testing.assert_allclose(report.train["loss"], finished[0].train["loss"], rtol=1e-5)


@pytest.fixture
def compiled(tmp_path):
  """The programs that were compiled: their names in a persistent cache of the test's own."""
  own = {
    "jax_compilation_cache_dir": str(tmp_path),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: getattr(jax.config, name) for name in own}

  def use(settings):
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()

  use(own)
  yield lambda: {path.name for path in tmp_path.glob("*-cache")}
  use(before)


def test_a_run_of_another_seed_missing_rate_and_number_of_epochs_compiles_nothing(compiled):
  def train_with(rate, epochs, seed):
    method = meta.METHODS["m3s"](masking.span(rate), order="first")
    run(recipe(method=method, epochs=epochs), key=jax.random.key(seed))
    return compiled()

  programs = train_with((0.2, 0.5), 1, 0)
  assert any("run" in name for name in programs)
  assert train_with((0.4, 0.9), 2, 1) == programs
