"""Searches: trials as run folders, on validation alone; workers that stop or die."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import chex
import pytest

optuna = pytest.importorskip("optuna")

from command import ROOT, call, final, refused, start  # noqa: E402
from experiments import build, loop, settings, together, trials, workdir  # noqa: E402
from mmjax import runs  # noqa: E402

SPACE = """
from optuna.distributions import CategoricalDistribution, FloatDistribution

SPACE = {
  "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
  "method.optimizer.name": CategoricalDistribution(("sgd", "adam")),
}
"""


LINGERING = "--config.model.name=toy:make_lingering"


def flags(folder, out, *more):
  file = folder / "space.py"
  file.write_text(SPACE)
  return (
    f"--config={ROOT / 'tests' / 'toy_config.py'}:tiny",
    "--config.train.batch_size=8",
    f"--data_dir={folder / 'data'}",
    f"--out={out}",
    f"--space={file}",
    *more,
  )


def results(out, url=None):
  return trials.told(tries(out, url or f"sqlite:///{out / 'study.db'}"))


def tries(out, url):
  with trials.open_study(url, out.name, "min", optuna.pruners.NopPruner(), 60) as (study, _):
    return study.trials


def test_a_search_ends_in_a_config_and_goes_on_with_more_trials(folder):
  out, epochs = folder / "search", "--config.train.epochs=2"
  code, output = call("tune", *flags(folder, out, epochs, "--trials=1"))
  assert code == 0, output
  first = results(out)
  assert [one.state.name for one in first.values()] == ["COMPLETE"]
  before = final(out / "trials" / "0000")
  code, output = call("tune", *flags(folder, out, epochs, "--trials=2"))
  assert code == 0, output
  found = results(out)
  assert list(found) == [0, 1] and found[0].params == first[0].params
  chex.assert_trees_all_equal(before, final(out / "trials" / "0000"))
  best = min(found, key=lambda number: found[number].value)
  for number, one in found.items():
    path = out / "trials" / f"{number:04d}"
    config = runs.read_config(path)["run"]["config"]
    assert config["optimizer"]["learning_rate"] == one.params["optimizer.learning_rate"]
    assert config["method"]["optimizer"]["name"] == one.params["method.optimizer.name"]
    log = [line["valid"]["mae"] for line in workdir.history(path)]
    assert one.value == pytest.approx(min(log), rel=1e-6)
    assert one.intermediate_values == dict(enumerate(log))
    assert all("test" not in line for line in workdir.history(path))
  winner = out / "trials" / f"{best:04d}"  # it refuses another config
  code, output = call(
    "train", f"--config={out / 'best.py'}", f"--data_dir={folder / 'data'}", f"--workdir={winner}"
  )
  assert code == 0 and f"valid/mae = {found[best].value:.4f}" in output, output
  assert len((out / "trials.csv").read_text().splitlines()) == 1 + 2
  for name in ("history.png", "importance.png"):
    assert (out / name).stat().st_size > 5000
  code, output = call("tune", *flags(folder, out, "--config.train.epochs=3"))
  assert code == 1 and "train.epochs: 2 there, 3 asked for" in output


NUMBERS = """
from optuna.distributions import FloatDistribution, IntDistribution

SPACE = {
  "optimizer.learning_rate": FloatDistribution(1e-3, 1e-2, log=True),
  "method.optimizer.learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
  "mask.rate": FloatDistribution(0.1, 0.9),
}
"""


def test_trials_that_differ_in_numbers_train_as_one_program(folder):
  out, file = folder / "together", folder / "numbers.py"
  file.write_text(NUMBERS)
  more = ("--config.valid.rate=0.5", "--config.train.epochs=2", f"--space={file}")
  code, output = call("tune", *flags(folder, out, *more, "--trials=2", "--together=2"))
  assert code == 0, output
  found = results(out)
  assert [one.state.name for one in found.values()] == ["COMPLETE"] * 2
  assert found[0].value != found[1].value and "trial 1 (" in output
  assert not list((out / "together").iterdir())
  config = settings.from_json(runs.read_config(out / "trials" / "0001")["run"]["config"])
  run = build.make_run(config, build.load_data(config, folder / "data"))
  alone = folder / "alone"
  loop.execute(run, alone, folder / "data")
  for here, there in zip(
    workdir.history(alone), workdir.history(out / "trials" / "0001"), strict=True
  ):
    assert here["valid"]["mae"] == pytest.approx(there["valid"]["mae"], rel=1e-4)
    assert here["train"]["loss"] == pytest.approx(there["train"]["loss"], rel=1e-4)
  assert found[1].value == pytest.approx(min(found[1].intermediate_values.values()), rel=1e-6)


def test_what_cannot_be_traced_is_a_program_of_its_own(folder):
  def run(**entries):
    config = settings.load(str(ROOT / "tests" / "toy_config.py"), "tiny")
    names = {name.replace("__", "."): value for name, value in entries.items()}
    settings.assign_all(config, {"train.batch_size": 8, **names})
    return build.make_run(config, dataset)

  dataset = build.load_data(settings.load("quickstart", "tiny"), folder / "data")
  tried = [
    run(optimizer__learning_rate=0.1),
    run(optimizer__learning_rate=0.2, optimizer__weight_decay=0.1),  # a step more than without
    run(optimizer__learning_rate=0.3, mask__rate=0.2),
    run(optimizer__learning_rate=0.4, mask__rate=0.3),
    run(method__inner_steps=3),
    run(train__batch_size=16),
    run(train__epochs=1),
    run(seed=5),
    run(optimizer__groups=(("a", {"learning_rate": 0.1}),)),
    run(optimizer__groups=(("a", {"learning_rate": 0.2}),)),
    run(optimizer__groups=(("b", {"learning_rate": 0.2}),)),
  ]
  assert together.Groups().of(tried) == [[0, 7], [1], [2, 3], [4], [5], [6], [8, 9], [10]]
  assert not together.can_trace(tried[1], ["optimizer.weight_decay"])


@pytest.mark.parametrize(
  ("entry", "told"),
  (
    ("'optimizer.learning_rat': FloatDistribution(0, 1)", "did you mean 'learning_rate'"),
    ("'optimizer.learning_rate': 3", "expected one of optuna.distributions"),
    ("'train.select': CategoricalDistribution(('valid/mae',))", "compared by one metric"),
    ("'valid.rate': FloatDistribution(0, 1)", "the same missing data"),
    ("'mask.rate': FloatDistribution(0, 1)", "--config.valid.rate=… fixes it there"),
    ("'optimizer.weight_decay': FloatDistribution(0, 1)", "by a flag, and in the space too"),
    ("'train.epochs': IntDistribution(0, 5)", "the space cannot have train.epochs=0"),
    ("'method.name': CategoricalDistribution(('orig', 'spl', 'm4s'))", "did you mean 'm3s'"),
  ),
)
def test_a_space_is_refused_before_any_work(folder, tmp_path, entry, told):
  file = tmp_path / "space.py"
  file.write_text(f"from optuna.distributions import *\nSPACE = {{{entry}}}\n")
  more = (f"--space={file}", "--config.optimizer.weight_decay=0.1")
  assert told in refused("tune", *flags(folder, tmp_path / "out", *more))
  assert not (tmp_path / "out").exists()


def test_the_test_split_selects_nothing(folder, tmp_path):
  for entry in ("train.select=test/mae", "train.log_test=True"):
    told = refused("tune", *flags(folder, tmp_path / "out", f"--set={entry}"))
    assert "reads the validation split alone" in told
  assert not (tmp_path / "out").exists()


SMALL = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


@pytest.fixture
def queues(tmp_path):
  """`queues(budget)`: a worker's queue of one and the same study; grace is a second."""

  url, pruner = f"sqlite:///{tmp_path / 'study.db'}", optuna.pruners.NopPruner()
  with contextlib.ExitStack() as opened:

    def make(budget, seed=0):
      found = opened.enter_context(trials.open_study(url, "s", "min", pruner, 1))
      return trials.Queue(*found, SMALL, budget, seed, 1)

    yield make


def test_two_workers_share_the_trials_and_draw_no_value_twice(queues):
  workers, values = (queues(5), queues(5)), {}
  while asked := [found for worker in workers if (found := worker.ask()) is not None]:
    for worker, (trial, given) in zip(workers, asked, strict=False):
      values[trial.number] = given["x"]
      worker.tell(trial, given["x"])
  assert sorted(values) == list(range(5)) and len(set(values.values())) == 5
  assert all(worker.is_over() for worker in workers)


def test_the_last_trial_is_one_workers_alone(queues, monkeypatch):
  """Both count the trials before either asks."""
  first, second = queues(1), queues(1)
  trial, _ = first.ask()
  stale = [[], second.trials()]  # what the second saw before, and sees after it has asked
  monkeypatch.setattr(second, "trials", lambda: stale.pop(0))
  assert second.ask() is None
  monkeypatch.undo()
  assert list(trials.told(second.trials())) == [trial.number]


def test_a_dead_workers_trial_is_tried_again_once_in_its_folder(queues):
  """Two workers see it at once; what failed for a reason is not tried again."""
  dead, first, second = queues(2), queues(2), queues(2)
  trial, values = dead.ask()
  other, _ = dead.ask()
  dead.tell(other, state=optuna.trial.TrialState.FAIL, error="of its own")
  assert first.ask() is None and not first.is_over()
  time.sleep(2.1)
  first.beat([])
  first.study.enqueue_trial(values, user_attrs={"root": trial.number})  # as the second would
  retried, again = first.ask()
  assert again == values and retried.user_attrs["root"] == trial.number
  assert second.ask() is None
  first.tell(retried, 0.5)
  assert first.is_over() and second.is_over()
  found = trials.told(first.trials())
  assert {n: one.state.name for n, one in found.items()} == {0: "COMPLETE", 1: "FAIL"}
  dead.tell(trial, 0.1)  # it was not dead after all
  assert trials.told(first.trials())[0].value == 0.5


def test_what_kills_every_worker_is_given_up(queues):
  queue = queues(1)
  for _ in range(1 + trials.RETRIES):
    for stopped in (True, False):  # a signal says nothing against a trial
      assert not queue.is_over()
      trial, _ = queue.ask()
      queue.tell(trial, state=optuna.trial.TrialState.FAIL, stopped=stopped)
      queue.recover()
  assert queue.ask() is None and queue.is_over()


@pytest.mark.slow
def test_pruned_and_stopped_trials(folder):
  """A signal saves all; what is not promising ends early."""
  out, more = folder / "pruned", ("--config.train.epochs=20", "--trials=8", "--warmup=2", LINGERING)
  file = folder / "rates.py"
  file.write_text(SPACE.replace("1e-4, 1e-2", "1e-7, 1e-2"))
  more += (f"--space={file}", "--processes=2")
  worker = start("tune", *flags(folder, out, *more))
  end = time.monotonic() + 300
  while len(workdir.history(out / "trials" / "0000")) < 2:
    assert worker.poll() is None and time.monotonic() < end
    time.sleep(0.05)
  worker.send_signal(signal.SIGTERM)
  output, _ = worker.communicate(timeout=300)
  assert worker.returncode == 128 + signal.SIGTERM and "The same command goes on" in output
  code, output = call("tune", *flags(folder, out, *more))
  assert code == 0, output
  found = results(out)
  states = [one.state.name for one in found.values()]
  assert len(states) == 8 and set(states) == {"COMPLETE", "PRUNED"}
  assert found[0].user_attrs["root"] == 0  # its second try, in its folder
  for number, one in found.items():
    path = out / "trials" / f"{number:04d}"
    assert workdir.is_done(path) == (one.state.name == "COMPLETE")
    log = workdir.history(path)
    assert [line["epoch"] for line in log] == list(range(len(log)))


@pytest.fixture
def postgresql():
  """The URL of a database server; skips where PostgreSQL is not installed."""
  known = pathlib.Path("/usr/lib/postgresql").glob("*/bin")
  path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, known)])
  binaries = [shutil.which(name, path=path) for name in ("initdb", "postgres")]
  if None in binaries:
    pytest.skip("needs PostgreSQL (apt-get install postgresql)")
  pytest.importorskip("psycopg")
  initdb, postgres = binaries
  folder = tempfile.mkdtemp()
  user = "nobody" if os.geteuid() == 0 else None  # it serves under no root
  if user:
    shutil.chown(folder, user)
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
  common = {"cwd": folder, "user": user, "stdout": subprocess.DEVNULL}
  create = [initdb, "-D", f"{folder}/data", "-A", "trust", "-U", "mmjax", "--no-sync"]
  subprocess.run(create, check=True, **common)
  serve = [postgres, "-D", f"{folder}/data", "-p", str(port), "-h", "127.0.0.1", "-k", folder]
  with subprocess.Popen([*serve, "-F"], stderr=subprocess.DEVNULL, **common) as server:
    end = time.monotonic() + 60
    while time.monotonic() < end:
      with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        break
      time.sleep(0.1)
    yield f"postgresql://mmjax@127.0.0.1:{port}/postgres"
    server.send_signal(signal.SIGINT)  # fast shutdown
  shutil.rmtree(folder)


@pytest.mark.slow
def test_two_workers_on_postgresql_one_of_which_is_killed(folder, postgresql):
  """No trial is lost or doubled; that of the dead worker goes on in its folder."""
  out, count = folder / "shared", 4
  more = ("--config.train.epochs=20", f"--trials={count}", "--processes=1", "--pruner=none")
  more += (f"--storage={postgresql}", "--grace=5", LINGERING)
  workers = [start("tune", *flags(folder, out, *more)) for _ in range(2)]
  paths = [out / "trials" / f"{number:04d}" for number in range(2)]
  end = time.monotonic() + 300
  while not all(workdir.history(path) for path in paths):
    for worker in workers:
      assert worker.poll() is None, worker.communicate()[0]
    assert time.monotonic() < end
    time.sleep(0.05)
  workers[0].kill()
  assert not any(workdir.is_done(path) for path in paths)
  workers[0].communicate()
  output, _ = workers[1].communicate(timeout=500)
  assert workers[1].returncode == 0, output
  all_tries = tries(out, postgresql)
  assert sorted(one.state.name for one in all_tries) == ["COMPLETE"] * count + ["FAIL"]
  found = results(out, postgresql)
  (lost,) = (one for one in all_tries if one.state.name == "FAIL")
  assert found[lost.number].params == lost.params
  assert len(found) == count
  folders = {int(path.name): path for path in (out / "trials").iterdir()}
  assert folders.keys() == found.keys()
  for number, one in found.items():
    log = workdir.history(folders[number])
    assert [line["epoch"] for line in log] == list(range(20))
    assert one.value == pytest.approx(min(line["valid"]["mae"] for line in log), rel=1e-6)
