"""Trains the toy on all devices of all processes and saves what it learned.

python tests/parallel_worker.py OUT [HOST:PORT,PROCESSES,PROCESS [DATA_DIR]]

Reads DATA_DIR's dataset "small" as a stream, if given, instead of the toy's data.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import toy
from mmjax import checkpoint, evaluate, masking, meta, optim, parallel, recurrence, stream, train


def recipe(mesh) -> train.Recipe:
  mask = masking.span((0.2, 0.5))
  inner = dict(order="second", inner_steps=2, optimizer=dict(name="sgd", learning_rate=0.01))
  return train.Recipe(
    system=toy.make_system(),
    method=meta.METHODS["m3s"](mask, **inner),
    optimizers={"main": optim.make(name="sgd", learning_rate=0.03)},
    batch_size=8,
    epochs=3,
    mesh=mesh,
  )


def run(mesh, data=None, spec=toy.SPEC):
  """The reports of a whole training."""
  plan, data = recipe(mesh), toy.make_batch(32) if data is None else data
  if spec is not toy.SPEC:
    plan = plan._replace(system=plan.system._replace(init=toy.init_for(spec)))
  progress = train.start(plan, data, spec, jax.random.key(5))
  evaluators = {"valid": lambda params, extra: {"mae": float(abs(params["head"]["bias"]))}}
  return list(train.fit(plan, data, evaluators, progress, jax.random.key(5)))


def main(out, hosts="", data_dir=""):
  if hosts:
    address, count, number = hosts.split(",")
    jax.distributed.initialize(address, int(count), int(number))
  parallel.LEAST_ROWS = 1  # or one core would do
  mesh = parallel.make_mesh(8)
  out = pathlib.Path(out)
  seen = []
  if data_dir:
    dataset = stream.open_dataset(data_dir, "small")
    source = Recorded(dataset.train, seen)
    reports = run(mesh, source, dataset.spec)
  else:
    reports = run(mesh)
    steps = checkpoint.manager(out / "checkpoints")
    checkpoint.save(steps, 1, reports[-1].progress)
    again = checkpoint.restore(steps, reports[-1].progress)
    jax.tree.map(np.testing.assert_array_equal, *map(parallel.local, (again, reports[-1].progress)))
    steps.close()
  params = jax.tree.map(lambda a: np.asarray(a).tolist(), reports[-1].progress.state.params)
  found = {
    "params": params,
    "train": [r.train for r in reports],
    "devices": jax.device_count(),
    "seen": seen,
    "sums_over_devices": sums_over_devices(mesh),
    "grid": predictions().tolist(),
    "lstm": lstm(mesh),
    "moves_rows": moves_rows(mesh),
  }
  (out / f"{jax.process_index()}.json").write_text(json.dumps(found))


def predictions() -> np.ndarray:
  """Nine cells of a grid, which no number of devices but three and nine divides."""
  conditions = evaluate.parse_rates("0,0.3,0.6")
  grid = evaluate.make_grid(
    toy.make_system(), toy.make_batch(10), conditions, [0, 1, 2], batch_size=4
  )
  return grid(*toy.init(jax.random.key(0), toy.SPEC))


def lstm(mesh) -> dict:
  """Gradients and second derivatives of a BiLSTM, and whether its loops wait for other devices."""
  random = np.random.default_rng(0)
  x, valid = random.normal(size=(8, 5, 2)), np.arange(5) < random.integers(1, 6, (8, 1))
  weights = [
    tuple(random.normal(size=shape).astype(np.float32) for shape in ((2, 12), (3, 12), (12,)))
    for _ in range(2)
  ]

  def loss(weights, batch):
    x, valid = batch
    outputs, finals = recurrence.bilstm(x.swapaxes(0, 1), valid.T, *weights)
    return sum(jnp.sum(a**2) for a in (*outputs, *finals))

  def all_of(weights, batch):
    gradient = lambda w: jax.grad(parallel.share(loss, mesh))(w, batch)  # noqa: E731
    of_gradient = lambda w: sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(w)))  # noqa: E731
    forward_over_reverse = jax.jvp(gradient, (weights,), (weights,))[1]
    return gradient(weights), forward_over_reverse, jax.grad(of_gradient)(weights)

  args = parallel.replicate((weights, (x.astype(np.float32), valid)), mesh)
  program = parallel.jit(all_of, mesh).lower(*args).compile()
  found = jax.tree.map(lambda a: np.asarray(a).tolist(), parallel.local(program(*args)))
  loops = [part for part in program.as_text().split("\n\n") if "ENTRY" not in part]
  return {"gradients": found, "waits": any(" all-reduce(" in part for part in loops)}


def sums_over_devices(mesh) -> bool:
  """Whether a step adds gradients up over devices: each computes a share only."""
  plan = recipe(mesh)
  state = train.create(plan, toy.SPEC, jax.random.key(5))
  step = jax.jit(train.make_step(plan, plan.system.phases[0]))
  program = step.lower(state, toy.make_batch(16), jax.random.key(5)).compile()
  return "all-reduce" in program.as_text()


def moves_rows(mesh) -> bool:
  """Whether a step of a stream sends rows from one device to another."""
  plan, rows, key = recipe(mesh), toy.make_batch(8), jax.random.key(5)
  state = parallel.replicate(train.create(plan, toy.SPEC, key), mesh)
  phase = plan.system.phases[0]
  _, metrics = jax.eval_shape(
    train.make_step(plan, phase), state, toy.make_batch(16), jax.random.key(5)
  )
  sums = parallel.replicate(jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), metrics), mesh)
  own = jax.tree.map(lambda a: np.stack([a[:: jax.process_count()]] * 3), rows)
  block = tuple(parallel.assemble(own, mesh, axis=1) for _ in range(2))
  program = stream.make_program(train.make_advance(plan, phase), mesh)
  text = (
    program.lower(state, sums, block, parallel.replicate(jax.random.key(5), mesh), 0, 3)
    .compile()
    .as_text()
  )
  kinds = ("all-gather", "collective-permute", "all-to-all")
  return any(f" {kind}{form}(" in text for kind in kinds for form in ("", "-start"))


class Recorded(stream.Stream):
  """A stream that notes which rows this process read."""

  def __new__(cls, source, seen):
    self = super().__new__(cls, *source)
    self.seen = seen
    return self

  def batches(self, *args, **kwargs):
    for drawn in super().batches(*args, **kwargs):
      self.seen.extend(int(n) for batch in drawn for n in batch.index)
      yield drawn


if __name__ == "__main__":
  main(*sys.argv[1:])
