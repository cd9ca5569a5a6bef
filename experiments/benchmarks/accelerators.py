"""What is a training step made of on a GPU or TPU? XLA's compilers for both run without either.

python -m experiments.benchmarks.accelerators
python -m experiments.benchmarks.accelerators --target=h100 --systems=self_mm,misa --json=rows.json
python -m experiments.benchmarks.accelerators --target=here

A row per target, setting, system and order of the meta-gradients: whether M³S's iteration compiles,
in what time, its temporaries, and what one call launches. A kernel costs some microseconds however
little it computes, and a conditional waits for the host: many of either make a fast card slow.
These are counts, not times; "roofline_s" is an estimate: FLOPs or bytes at the peaks of the card
(the longer of both) and 2 µs a kernel. Needs the extra "aot". The target "here" is this machine's
device, which needs no extra; there it runs, too: seconds to draw the parameters, of the first
step, and of the others.
"""

import collections
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
import tqdm
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from mmjax import masking, meta, models, parallel, recurrence, systems, types

from . import cases

_TARGETS = flags.DEFINE_list("target", ["h100", "v5e"], "What to compile for; here: what is there.")
_SYSTEMS = flags.DEFINE_list("systems", sorted(models.MODELS), "Which systems.")
_SETTINGS = flags.DEFINE_list("settings", ["aligned"], "aligned, unaligned, bert (a BERT-base).")
_ORDERS = flags.DEFINE_list("orders", list(meta.ORDERS), "first, second.")
_STEPS = flags.DEFINE_list("k", ["1"], "Numbers of inner steps.")
_PRECISION = flags.DEFINE_enum(
  "precision", "float32", systems.PRECISIONS, "What networks compute in."
)
_REMAT = flags.DEFINE_list("remat", ["steps"], "What second order recomputes, see meta.m3s.")
_DEVICES = flags.DEFINE_list("devices", ["1"], "How many devices share the rows, up to four.")
_SEEDS = flags.DEFINE_list("seeds", ["1"], "How many seeds are one program.")
_AS_TRAINED = flags.DEFINE_bool(
  "as_trained", False, "Draw dropout and missing spans in the step, as a training does."
)
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")

HERE = "here"
LAUNCH_S = 2e-6
ROWS = 32
SETTINGS = {
  "aligned": cases.Setting(cases.ALIGNED, ROWS),
  "unaligned": cases.Setting(cases.UNALIGNED, ROWS),
  "bert": cases.Setting(cases.ALIGNED, ROWS, tokens=True),
}
# Public figures of the card, as XLA's `GpuTargetConfigProto`.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
  """What is compiled for.

  Attributes:
    packages: the modules of the compiler, and the distributions that they are in.
    topology: arguments that describe the machine of COUNT devices.
    options: of the compiler.
    peak: FLOP/s of products, of float32's default precision; and bytes/s of its memory.
  """

  packages: dict[str, str]
  topology: dict[str, str]
  options: dict[str, Any]
  peak: tuple[float, float]


_UNTUNED = {**parallel.GPU_OPTIONS, "xla_gpu_autotune_level": 0}  # there is nothing to tune on
TARGETS = {
  "h100": Target(
    {"jax_plugins.xla_cuda12": "jax-cuda12-plugin", "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12"},
    dict(platform="cuda", topology_name="h100", topology="1x1xCOUNT", target_config=H100),
    _UNTUNED,
    (495e12, 3.35e12),
  ),
  "v5e": Target(
    {"libtpu": "libtpu"},
    dict(platform="tpu", topology_name="v5e:2x2"),
    {},
    (197e12, 0.82e12),
  ),
}


class Launches(NamedTuple):
  """What one call of a program launches; a loop's body counts as often as it runs.

  Attributes:
    kernels: operations that the device runs one by one.
    loop_iterations: of all loops.
    conditionals: decisions of the program; the dearest branch counts.
    unknown: loops whose number of iterations the program does not know; they count once.
    collectives: kernels that wait for the other devices.
    flops: of matrix products, but for those inside of Pallas kernels.
    bytes: that kernels read and write.
  """

  kernels: int = 0
  loop_iterations: int = 0
  conditionals: int = 0
  unknown: int = 0
  collectives: int = 0
  flops: int = 0
  bytes: int = 0


# Operations of an optimized program that are launched; the others move nothing or hold others.
LAUNCHED = re.compile(
  r"fusion|custom-call|dot|convolution|copy|copy-start|sort|reduce|reduce-window|scatter|gather"
  r"|dynamic-slice|dynamic-update-slice|transpose|concatenate|pad|iota|broadcast|cholesky"
  r"|triangular-solve|rng|rng-bit-generator"
)
_COLLECTIVE = re.compile(
  r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?"
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)")
_TYPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CONTRACTED = re.compile(r'lhs_contracting_dim\w*"?[=:][{\[]([^}\]]*)')
_COMMENT = re.compile(r"/\*.*?\*/")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def count_launches(text: str) -> Launches:
  """Counts in an optimized program, `compiled.as_text()`.

  Raises:
    ValueError: if the text is no such program.
  """
  bodies, types_of, name, entry = collections.defaultdict(list), {}, None, None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name = header[2]
      entry = name if header[1] else entry
    elif name and line.startswith("  "):
      line = _COMMENT.sub("", line)
      bodies[name].append(line)
      if found := _OPERATION.search(line):
        kinds = _TYPE.findall(found[2])
        types_of[found[1]] = kinds[:1] if "__cublas" in line else kinds  # no workspace
  if entry is None:
    raise ValueError("this is no optimized program: it has no ENTRY.")

  def add(*counts, times=1):
    return Launches(*(times * sum(parts) for parts in zip(*counts, strict=True)))

  @functools.cache
  def of(name):
    return add(Launches(), *map(of_line, bodies[name]))

  def named(key, line):
    found = re.search(rf"\b{key}=(\{{[^}}]*\}}|[^,]*)", line)
    return re.findall(r"[\w.\-]+", found[1]) if found else []

  @functools.cache
  def flops_in(name):
    return sum(map(flops_of, bodies[name]))

  def flops_of(line):
    found, contracted = _OPERATION.search(line), _CONTRACTED.search(line)
    if not (found and contracted):
      return sum(map(flops_in, named("calls", line)))
    sizes = _sizes(types_of[re.findall(r"[\w.\-]+", found[4])[0]][0])
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])]
    return 2 * math.prod(_sizes(types_of[found[1]][0])) * math.prod(sizes[axis] for axis in axes)

  def of_line(line):
    found = _OPERATION.search(line)
    operation = found[3] if found else ""
    if operation == "while":
      trips = _TRIPS.search(line)
      times = int(trips[1]) if trips else 1
      parts = (of(named(key, line)[0]) for key in ("body", "condition"))
      body = add(*parts, times=times)
      # a loop that is not left by a count known beforehand asks the host
      return add(body, Launches(loop_iterations=times, unknown=int(not trips)))
    if operation == "conditional":
      pair = [
        named(f"{side}_computation", line)[0]
        for side in ("true", "false")
        if f"{side}_comp" in line
      ]
      return add(max(map(of, pair or named("branch_computations", line))), Launches(conditionals=1))
    if operation in ("call", "async-start"):
      return of(named("to_apply" if "to_apply=" in line else "calls", line)[0])
    collective = _COLLECTIVE.fullmatch(operation) is not None
    if not (found and (collective or LAUNCHED.fullmatch(operation))):
      return Launches()
    moved = [found[1], *re.findall(r"%([\w.\-]+)", found[4])]
    size = sum(_bytes(kind) for name in moved for kind in types_of.get(name, ()))
    return Launches(1, collectives=int(collective), flops=flops_of(line), bytes=size)

  return of(entry)


def _sizes(kind):
  return [int(size) for size in kind[2].split(",") if size]


def _bytes(kind):
  """Of an array of (letters of its dtype, bits, sizes); a truth value takes a byte."""
  return math.prod(_sizes(kind)) * int(kind[1] or 8) // 8


class MissingCompiler(types.UsageError):
  """A target's compiler is not installed."""


def find_compiler(target: str) -> None:
  """Makes JAX find the compiler of a target; before any array exists.

  Raises:
    MissingCompiler: naming the packages that are not installed.
  """
  packages = TARGETS[target].packages
  places = {module: place for module in packages if (place := _folder(module))}
  missing = [package for module, package in packages.items() if module not in places]
  if missing:
    raise MissingCompiler(
      f"--target={target} needs {', '.join(missing)}: pip install 'mmjax[aot]', or name another."
    )
  if "libtpu" in places:
    os.environ.setdefault("TPU_LIBRARY_PATH", str(places["libtpu"] / "libtpu.so"))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it looks for a real one,
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # which processes could not share
  if "nvidia.cuda_nvcc" in places:  # its assembler
    tools = str(places["nvidia.cuda_nvcc"] / "bin")
    os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])


def _folder(module: str) -> pathlib.Path | None:
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:  # the package around it
    return None
  places = found.submodule_search_locations if found else None
  return pathlib.Path(next(iter(places))) if places else None


@functools.cache
def devices(target: str, count: int = 1) -> list[Any]:
  """Devices of the target, up to four, that no one needs to have."""
  find_compiler(target)
  topology = TARGETS[target].topology
  asked = {name: text.replace("COUNT", str(count)) for name, text in topology.items()}
  return topologies.get_topology_desc(**asked).devices[:count]


def make_mesh(target: str, count: int) -> Mesh | None:
  """Some devices of the target, to share rows; None for one."""
  if target == HERE and count > 1:
    return parallel.local_mesh(count)
  return None if count == 1 else Mesh(np.array(devices(target, count)), (parallel.AXIS,))


class Seconds(NamedTuple):
  """What something takes.

  Attributes:
    wall: on the clock, which other work on the machine lengthens.
    cpu: of all cores, of this process and of those that it started (assemblers): what one core
      that does nothing else would take.
  """

  wall: float
  cpu: float

  @classmethod
  def now(cls) -> Self:
    times = os.times()
    return cls(times.elapsed, sum(times[:4]))

  def since(self) -> Self:
    return type(self)(*(now - then for now, then in zip(self.now(), self, strict=True)))


def compile_for(
  target: str, function: Callable, *args: Any, mesh: Mesh | None = None
) -> tuple[Any, Seconds]:
  """Compiles a function for a target.

  Args:
    target: of `TARGETS`, or `HERE`.
    function: what `jax.jit` takes.
    *args: trees of arrays or their shapes.
    mesh: devices that each hold arguments and results; a single one by default.

  Returns:
    The compiled program, which only `HERE`'s can run, and what tracing and compiling took.
  """
  began = Seconds.now()
  if target == HERE:
    return parallel.jit(function, mesh).lower(*args).compile(), began.since()
  place = parallel.replicated(mesh) if mesh else SingleDeviceSharding(devices(target)[0])
  with recurrence.portable():
    lowered = jax.jit(function, in_shardings=place, out_shardings=place).lower(*args)
  return lowered.compile(TARGETS[target].options), began.since()


def make_spec(setting: cases.Setting) -> types.Spec:
  """Of the data of a setting."""
  text, *others = (types.ModalitySpec(*shape) for shape in setting.shapes)
  return types.Spec(text._replace(tokens=setting.tokens), *others, num_train=2 * setting.rows)


def training_step(
  system: types.System,
  setting: cases.Setting,
  order: str,
  k: int,
  *,
  remat: str = "steps",
  mesh: Mesh | None = None,
  seeds: int = 1,
  as_trained: bool = False,
) -> tuple[Callable, tuple]:
  """M³S's iteration of a system's last phase: meta-gradients, and shapes of its arguments.

  Unless it is `as_trained`, dropout is off and masks are drawn beforehand, as in the benchmark of
  times. The rows of a system that reads conversations are those of one. The devices of the mesh
  share the rows. Several seeds are one program: each has arguments of its own.
  """
  batch, spec = cases.make_batch(setting, 2 * setting.rows), make_spec(setting)
  if system.conversations:  # two, one to adapt to
    batch = batch._replace(info={"place": np.tile(np.eye(setting.rows, dtype=bool), (2, 1))})
  phase = system.phases[-1]
  params, extra = jax.eval_shape(lambda key: system.init(key, spec), jax.random.key(0))

  def loss(params, batch, key, extra):
    return phase.loss(params, batch, key if as_trained else None, extra)

  iteration = meta.m3s(
    parallel.share(loss, mesh),
    masking.span((0.1, 0.9)) if as_trained else lambda key, batch: batch,
    inner_steps=k,
    inner_optimizer=optax.sgd(1e-3),
    order=order,
    mode="mixed" if phase.hessian == "symmetric" else "reverse",
    remat=remat,
  )
  args = params, batch, jax.random.key(2), extra
  step = jax.value_and_grad(iteration, has_aux=True)
  if seeds == 1:
    return step, jax.eval_shape(lambda *a: a, *args)
  return jax.vmap(step), jax.eval_shape(lambda *a: _stacked(a, seeds), *args)


def _stacked(args, seeds):
  return jax.tree.map(lambda a: jnp.stack([a] * seeds), args)


def measure(
  target: str,
  system: str,
  setting: str,
  order: str,
  k: int,
  remat: str = "steps",
  count: int = 1,
  precision: str = "float32",
  seeds: int = 1,
  as_trained: bool = False,
) -> dict[str, Any]:
  """One row. What does not compile says why in "error"."""
  row = dict(target=target, system=system, setting=setting, order=order, k=k, precision=precision)
  row |= dict(remat=remat, devices=count, seeds=seeds, as_trained=as_trained)
  own = {"bert": cases.BERT} if SETTINGS[setting].tokens else {}
  try:
    made, mesh = models.MODELS[system](**own), make_mesh(target, count)
    made = systems.in_precision(made, precision)
    function, args = training_step(
      *(made, SETTINGS[setting], order, k),
      remat=remat,
      mesh=mesh,
      seeds=seeds,
      as_trained=as_trained,
    )
    compiled, seconds = compile_for(target, function, *args, mesh=mesh)
  except MissingCompiler:
    raise
  except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and the row tells it
    told = str(error).strip() or type(error).__name__
    return {**row, "compiles": False, "error": told.splitlines()[0][:200]}
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  ran = run(compiled, made, SETTINGS[setting], mesh, seeds) if target == HERE else {}
  launches = count_launches(compiled.as_text())
  # a TPU's compiler tells them itself: its products have other names
  launches = launches._replace(
    flops=int(cost.get("flops", launches.flops)),
    bytes=int(cost.get("bytes accessed", launches.bytes)),
  )
  bound = {}
  if target != HERE:
    peaks = TARGETS[target].peak
    times = launches.flops / peaks[0], launches.bytes / peaks[1]
    bound = {"roofline_s": float(f"{max(times) + LAUNCH_S * launches.kernels:.2g}")}
  return {
    **row,
    **ran,
    **bound,
    "compiles": True,
    "compile_s": round(seconds.wall, 1),
    "compile_cpu_s": round(seconds.cpu, 1),
    "temp_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    **launches._asdict(),
  }


def run(
  compiled: Any,
  system: types.System,
  setting: cases.Setting,
  mesh: Mesh | None = None,
  seeds: int = 1,
) -> dict[str, float]:
  """Seconds of a compiled `training_step` on this machine.

  Returns:
    "init_s", "first_run_s" and, a median, "step_s": the first step of a training comes after the
    first two and "compile_s".
  """
  key = jax.block_until_ready(jax.random.key(0))

  def timed(function, *args):
    began = time.perf_counter()
    found = jax.block_until_ready(function(*args))
    return found, time.perf_counter() - began

  (params, extra), init_s = timed(system.init, key, make_spec(setting))
  batch = cases.make_batch(setting, 2 * setting.rows)
  args: Any = (params, batch, key, extra)
  if seeds > 1:
    args = _stacked(args, seeds)
  args = parallel.replicate(args, mesh)
  _, first_s = timed(compiled, *args)
  steps = [timed(compiled, *args)[1] for _ in range(max(3, min(100, int(2 / first_s))))]
  found = {"init_s": init_s, "first_run_s": first_s, "step_s": statistics.median(steps)}
  return {name: float(f"{seconds:.3g}") for name, seconds in found.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows as Markdown."""
  head = ["target", "setting", "system", "order", "k", "compiles", "compile_s", "compile_cpu_s"]
  head += ["temp_MB"]
  head += [name for name in ("init_s", "first_run_s", "step_s") if any(name in r for r in rows)]
  head += ["kernels", "loop_iterations", "conditionals", "collectives"]
  usual = {"precision": "float32", "remat": "steps", "devices": 1, "seeds": 1, "as_trained": False}
  head += [name for name, value in usual.items() if any(row[name] != value for row in rows)]
  megabytes = lambda row: {**row, "temp_MB": round(row.get("temp_bytes", 0) / 1e6, 1)}  # noqa: E731
  body = [[megabytes(row).get(name, "") for name in head] for row in rows]
  return tabulate.tabulate(body, head, tablefmt="github")


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  if HERE not in _TARGETS.value:
    jax.config.update("jax_platforms", "cpu")  # what is there is not asked
  jax.config.update("jax_enable_compilation_cache", False)  # or it would not take its time
  for target in _TARGETS.value:
    if target != HERE:
      find_compiler(target)
  todo = [
    (target, system, setting, order, int(k), remat, int(count), _PRECISION.value, int(seeds))
    for target in _TARGETS.value
    for setting in _SETTINGS.value
    for system in _SYSTEMS.value
    for order in _ORDERS.value
    for k in _STEPS.value
    for remat in (_REMAT.value if order == "second" else _REMAT.value[:1])
    for count in _DEVICES.value
    for seeds in _SEEDS.value
  ]
  rows = []
  for what in tqdm.tqdm(todo, disable=None):
    rows.append(measure(*what, as_trained=_AS_TRAINED.value))
    if _JSON.value:
      pathlib.Path(_JSON.value).write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
  print(table(rows))
  for row in rows:
    if not row["compiles"]:
      print(f"{row['target']} {row['setting']} {row['system']} {row['order']}: {row['error']}")


if __name__ == "__main__":
  app.run(main)
