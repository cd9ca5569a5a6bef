"""Trains the toy on all devices of all processes and saves what it learned.

python tests/parallel_worker.py OUT [HOST:PORT,PROCESSES,PROCESS [DATA_DIR]]

Reads DATA_DIR's dataset "small" as a stream, if given, instead of the toy's data.
"""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
import optax

import toy
from mmjax import checkpoint, evaluate, masking, meta, optim, parallel, stream, train


def recipe(mesh) -> train.Recipe:
  mask = masking.span((0.2, 0.5))
  inner = dict(mask=mask, inner_optimizer=optax.sgd(0.01), order="second", inner_steps=2)
  return train.Recipe(
    system=toy.make_system(),
    method=lambda key: functools.partial(meta.m3s, **inner),
    optimizers={"main": optim.make(name="sgd", learning_rate=0.03)},
    batch_size=8,
    draws=2,
    epochs=3,
    mesh=mesh,
  )


def run(mesh, data=None, spec=toy.SPEC):
  """The reports of a whole training."""
  plan, data = recipe(mesh), toy.make_batch(32) if data is None else data
  if spec is not toy.SPEC:
    plan = plan._replace(system=plan.system._replace(init=toy.init_for(spec)))
  progress = train.start(plan, data, spec, jax.random.key(5))
  validate = lambda params, extra: {"mae": float(abs(params["head"]["bias"]))}  # noqa: E731
  return list(train.fit(plan, data, validate, progress, jax.random.key(5)))


def main(out, hosts="", data_dir=""):
  if hosts:
    address, count, number = hosts.split(",")
    jax.distributed.initialize(address, int(count), int(number))
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
  found = {"params": params, "train": [r.train for r in reports], "devices": jax.device_count(),
           "seen": seen, "sums_over_devices": sums_over_devices(mesh),
           "grid": predictions().tolist()}  # fmt: skip
  (out / f"{jax.process_index()}.json").write_text(json.dumps(found))


def predictions() -> np.ndarray:
  """Nine cells of a grid, which no number of devices but three and nine divides."""
  grid = evaluate.make_grid(toy.make_system(), toy.make_batch(10), batch_size=4)
  params, extra = toy.init(jax.random.key(0), toy.SPEC)
  rates = np.stack([c.rates for c in evaluate.parse_rates("0,0.3,0.6")])
  return np.asarray(grid(params, extra, rates, [0, 1, 2]))


def sums_over_devices(mesh) -> bool:
  """Whether a step adds gradients up over devices: each computes a share only."""
  plan = recipe(mesh)
  state = train.create(plan, toy.SPEC, jax.random.key(5))
  step = jax.jit(train.make_step(plan, plan.system.phases[0]))
  program = step.lower(state, toy.make_batch(16), jax.random.key(5)).compile()
  return "all-reduce" in program.as_text()


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
