"""Data parallelism: every device holds the parameters and computes its share of each batch.

Arrays stay global: a program that runs on a mesh computes what it computes on one device (up to
the order of sums), statistics over the batch included. Several hosts run the same program, each
on its own devices; see `jax.distributed`.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import core
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"
# A core of a CPU takes as long for fewer rows: two devices took 56 ms for MISA's 32, one took 36.
LEAST_ROWS = 64
# What XLA would make of Triton is most of the time that a GPU's program compiles: it weighs tiles
# of a kernel that holds a whole softmax or norm at each of its fusions, for a few kernels less of a
# hundred; and it compiles small products (on a card each in many ways) that libraries have.
GPU_OPTIONS = {
  "xla_disable_hlo_passes": "triton-softmax-rewriter",
  "xla_gpu_enable_triton_gemm": False,
}

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mmjax_mesh", default=None)


def worthwhile(rows: int, devices: int) -> int:
  """How many devices share a batch, so that it takes the least time.

  Args:
    rows: B.
    devices: how many there are.

  Returns:
    All of an accelerator's; of a CPU's cores as many as divide B and get `LEAST_ROWS` rows each.
  """
  if jax.default_backend() != "cpu":
    return devices
  most = min(devices, max(rows // LEAST_ROWS, 1))
  return max(n for n in range(1, most + 1) if rows % n == 0)


def make_mesh(batch_size: int) -> Mesh | None:
  """The devices that share a training's batches, or None where one does best.

  Those of several processes all take part; of one process's, as many as `worthwhile` says.

  Args:
    batch_size: B; it must be divisible by the number of devices.

  Raises:
    ValueError: if it is not.
  """
  devices = jax.devices()
  if jax.process_count() == 1:
    devices = devices[: worthwhile(batch_size, len(devices))]
  if len(devices) == 1:
    return None
  if batch_size % len(devices):
    raise ValueError(
      f"batch_size is {batch_size}, but must be divisible by the {len(devices)} devices: change"
      " train.batch_size, or show fewer devices to the process (CUDA_VISIBLE_DEVICES)."
    )
  return Mesh(np.array(devices), (AXIS,))


def local_mesh(shares: int) -> Mesh:
  """A mesh of this process's devices, no more than there are shares."""
  return Mesh(np.array(jax.local_devices()[:shares]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh | None) -> Any:
  """The tree on every device; each process gives the same values."""
  if mesh is None:
    return jax.tree.map(jax.numpy.asarray, tree)
  place = functools.partial(_place, sharding=replicated(mesh))
  return jax.tree.map(place, tree)


def _place(leaf, sharding):
  if jax.numpy.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
    data = _place(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
  if getattr(leaf, "sharding", None) == sharding:
    return leaf
  return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), np.shape(leaf))


def local(tree: Any) -> Any:
  """Replicated arrays as arrays on the first device of this process."""
  return jax.tree.map(lambda a: a.addressable_data(0) if isinstance(a, jax.Array) else a, tree)


def agree(value: float | bool) -> float:
  """The largest value that any process gives: what differs between clocks must not divide them."""
  if jax.process_count() == 1:
    return float(value)
  return float(multihost_utils.process_allgather(np.float32(value)).max())


def share(loss: Callable, mesh: Mesh | None) -> Callable:
  """The loss whose batch the devices share inside of a program, the same up to the order of sums.

  Args:
    loss: `(params, batch, *args) -> …`; the leaves of the batch are [B, ...].
    mesh: the devices; None returns the loss as it is. A batch whose rows they cannot share evenly
      is computed by each of them (`meta.hardest` takes the loss of single rows).

  Returns:
    A loss with the signature of `loss`.
  """
  if mesh is None:
    return loss
  rows = NamedSharding(mesh, PartitionSpec(AXIS))

  def shared(params, batch, *args):
    if jax.tree.leaves(batch)[0].shape[0] % mesh.size:
      return loss(params, batch, *args)
    token = _MESH.set(mesh)
    try:
      return loss(params, jax.lax.with_sharding_constraint(batch, rows), *args)
    finally:
      _MESH.reset(token)

  return shared


def gather(tree: Any) -> Any:
  """In a loss of `share`: arrays [B, ...] of which each device has its rows, whole on all of them.

  Between what reads row by row and what reads the batch: one exchange, not one for each statistic.
  """
  mesh = _MESH.get()
  return tree if mesh is None else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def jit(function: Callable, mesh: Mesh | None, **options) -> Callable:
  """`jax.jit`, for several devices with results that each of them holds; not within another jit."""
  placed = {} if mesh is None else {"out_shardings": replicated(mesh)}
  if jax.default_backend() == "gpu":
    options["compiler_options"] = GPU_OPTIONS
  return jax.jit(function, **placed, **options)


class Program:
  """`jit` of a function of arguments of always the same shapes, consuming the first two.

  Arrays that the function closes over, as missing rates, are arguments of what is compiled: one
  program in the persistent cache serves all their values.
  """

  def __init__(self, function: Callable, mesh: Mesh | None):
    self._function, self._mesh = function, mesh
    self._traced: tuple[Any, list[Any]] | None = None

  def __call__(self, *args: Any) -> Any:
    program, constants = self._trace(args)
    return program(*args, constants)

  def lower(self, *args: Any) -> jax.stages.Lowered:
    """As that of `jax.jit`; what it compiles takes one argument more, a list of arrays."""
    program, constants = self._trace(args)
    return program.lower(*args, constants)

  def _trace(self, args):
    if self._traced is None:
      found, shapes = jax.make_jaxpr(self._function, return_shape=True)(*args)

      def run(*args):
        *args, constants = args
        out = core.eval_jaxpr(found.jaxpr, constants, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

      program = jit(run, self._mesh, donate_argnums=(0, 1))
      self._traced = program, replicate(found.consts, self._mesh)
    return self._traced


def by_rows(function: Callable, in_axes: Any, out_axes: Any, rows: int) -> Callable:
  """The function on each device's own rows, in a loss of `share`; elsewhere the function itself.

  For loops: the compiler would add up a loop's gradients over the devices at each of its steps.

  Args:
    function: of arrays or trees of them; its rows must not depend on one another.
    in_axes: of each argument, the axis of the rows, or None where it has none.
    out_axes: likewise of each result.
    rows: B; the function stays as it is unless the number of devices divides it.

  Returns:
    The function, whose gradients for arguments without rows are sums over the devices.
  """
  mesh = _MESH.get()
  if mesh is None or rows % mesh.size:
    return function

  def place(axis):
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)

  specs = [jax.tree.map(place, axes, is_leaf=lambda a: a is None) for axes in (in_axes, out_axes)]
  # the loops begin with zeros, which do not differ between devices: no check of what does
  return jax.shard_map(function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def assemble(tree: Any, mesh: Mesh | None, axis: int = 0) -> Any:
  """This process's rows [B / processes, ...] on the host -> the global [B, ...], shared out.

  The rows are those along an axis of the arrays.
  """
  if mesh is None:
    return jax.device_put(tree)  # takes aligned arrays as they are, jnp.asarray copies them
  sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)
