"""What a compiled program launches, counted; recurrences compiled for a GPU and a TPU."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import accelerators
from mmjax import models, recurrence

PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %twice = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="while(a)"}
  %sum = f32[4]{0} custom-call(%twice), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %out = (s32[], /*index=1*/f32[4]{0}) tuple(%n, %sum)
}

%condition (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %less = pred[] fusion(%p.1), kind=kLoop, calls=%compared
}

%cheap (q: f32[4]) -> f32[4] {
  ROOT %copy = f32[4]{0} copy(%q)
}

%dear (q.1: f32[4]) -> f32[4] {
  %sorted = f32[4]{0} sort(%q.1), dimensions={0}
  ROOT %copy.1 = f32[4]{0} copy(%sorted)
}

ENTRY %main (a: f32[4], b: s32[]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %loop = (s32[], f32[4]) while(), condition=%condition, body=%body, {"known_trip_count":{"n":"5"}}
  %y = f32[4]{0} get-tuple-element(%loop), index=1
  %z = f32[4]{0} conditional(%b, %y, %y), branch_computations={%cheap, %dear}
  %all = f32[4]{0} all-reduce-start(%z), to_apply=%add
  %done = f32[4]{0} all-reduce-done(%all)
  ROOT %called = f32[4]{0} call(%done), to_apply=%cheap
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_of_branches_the_dearest():
  found = accelerators.count_launches(PROGRAM)
  assert found[:5] == (5 * (2 + 1) + 2 + 1 + 1, 5, 1, 0, 1)
  unknown = accelerators.count_launches(PROGRAM.replace("known_trip_count", "init_step"))
  assert unknown[:5] == (1 * (2 + 1) + 2 + 1 + 1, 1, 1, 1, 1)
  two_ways = "true_computation=%dear, false_computation=%cheap"
  as_pair = PROGRAM.replace("branch_computations={%cheap, %dear}", two_ways)
  assert accelerators.count_launches(as_pair) == found
  with pytest.raises(ValueError, match="no optimized program"):
    accelerators.count_launches("module @jit_step {}")


PRODUCTS = """HloModule jit_step

%fused (a: f32[8,4], b: bf16[4,3]) -> f32[8,3] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[4,3]{1,0} parameter(1)
  %wide = f32[4,3]{1,0} convert(%b)
  ROOT %dot = f32[8,3]{1,0} dot(%a, %wide), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,4], w: bf16[4,3], v: f32[3,3]) -> f32[8,3] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = bf16[4,3]{1,0} parameter(1)
  %v = f32[3,3]{1,0} parameter(2)
  %y = f32[8,3]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused
  %seen = pred[8,3]{1,0} fusion(%y), kind=kLoop, calls=%compared
  %call = (f32[8,3]{1,0}, s8[4096]{0}) custom-call(%y, %v), custom_call_target="__cublas$gemm", \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  ROOT %out = f32[8,3]{1,0} get-tuple-element(%call), index=0
}
"""


def test_products_and_bytes_are_counted_where_the_compiler_does_not():
  found = accelerators.count_launches(PRODUCTS)
  assert found.flops == 2 * 8 * 3 * 4 + 2 * 8 * 3 * 3
  product, compared, call = 4 * (32 + 24) + 2 * 12, 4 * 24 + 24, 4 * (24 + 9 + 24)
  assert found.bytes == product + compared + call  # without a workspace


def test_a_missing_compiler_is_named(monkeypatch):
  absent = accelerators.TARGETS["h100"]._replace(packages={"nowhere.compiler": "the-wheel"})
  monkeypatch.setitem(accelerators.TARGETS, "h100", absent)
  with pytest.raises(accelerators.MissingCompiler, match="needs the-wheel: pip install") as error:
    accelerators.find_compiler("h100")
  assert "\n" not in str(error.value)


def second_order(weights, x, valid):
  def loss(weights):
    outputs, finals = recurrence.bilstm(x, valid, weights, weights)
    return sum(jnp.sum(a**2) for a in (*outputs, *finals))

  return jax.jvp(jax.grad(loss), (weights,), (weights,))


def shapes(steps, seeds=(), hidden=20):
  width = 5
  weights = [(*seeds, *s) for s in ((width, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,))]
  return (
    tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in weights),
    jax.ShapeDtypeStruct((steps, 20, width), jnp.float32),
    jax.ShapeDtypeStruct((steps, 20), bool),
  )


@pytest.fixture(params=accelerators.TARGETS)
def target(request):
  try:
    accelerators.find_compiler(request.param)
  except accelerators.MissingCompiler as error:
    tell = pytest.fail if os.environ.get("MMJAX_COMPILERS") == "required" else pytest.skip
    tell(str(error))
  return request.param


# What may be launched at the benchmark's sizes on an H100; a TPU's compiler fuses less.
@pytest.mark.parametrize(("name", "most"), [("lmf", 200), ("self_mm", 300)])
def test_a_systems_training_step_is_few_kernels_without_loops(target, name, most):
  setting = accelerators.SETTINGS["aligned"]
  step = accelerators.training_step(models.MODELS[name](), setting, "first", 1)
  compiled, _ = accelerators.compile_for(target, step[0], *step[1])
  found = accelerators.count_launches(compiled.as_text())
  assert found.loop_iterations == found.conditionals == found.unknown == 0
  assert most / 4 < found.kernels <= (most if target == "h100" else 1.5 * most)


def compile_and_count(target, function, *args):
  """What is launched, and how much of it are kernels of recurrences."""
  text = accelerators.compile_for(target, function, *args)[0].as_text()
  kernels = sum("lstm_" in line and " custom-call(" in line for line in text.splitlines())
  return accelerators.count_launches(text), kernels


def test_a_wide_recurrence_is_one_kernel_as_a_narrow_one_is(target):
  """Of GCNet's 250 units, whose weights no multiprocessor holds."""
  found, kernels = compile_and_count(target, second_order, *shapes(9, hidden=250))
  assert found.loop_iterations == found.conditionals == found.unknown == 0
  assert kernels == 4


def test_second_order_through_a_recurrence_is_four_kernels_of_any_length(target):
  compiled = functools.partial(compile_and_count, target)
  short, kernels = compiled(second_order, *shapes(9))
  assert short.loop_iterations == short.conditionals == 0
  assert kernels == 4  # forward and backward, and the tangents of both
  long, _ = compiled(second_order, *shapes(300))
  assert long.loop_iterations == 0
  assert long.kernels <= short.kernels + 4  # sums over many steps are taken in parts
  seeds = jax.vmap(second_order, (0, None, None))
  three, kernels = compiled(seeds, *shapes(9, seeds=(3,)))
  assert kernels == 4
  assert three.kernels <= 1.2 * short.kernels


def test_second_order_through_a_decoder_that_attends_is_four_kernels(target):
  steps, rows, length, hidden = 49, 32, 50, 32
  sizes = (steps, rows, 8 * hidden), (rows, length, hidden), (rows, length, hidden)
  others = (rows, hidden), (hidden, hidden), (hidden, 1), (hidden, 8 * hidden)
  given, states, keys, *others = (
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*sizes, *others)
  )

  def second_order(*args):
    def loss(given, states, keys, *others):
      found = recurrence.attend_and_decode(given, states, keys, True, *others)
      return sum(jnp.sum(jnp.sin(a)) for a in found)

    return jax.jvp(jax.grad(loss, range(7)), args, args)

  compiled, _ = accelerators.compile_for(target, second_order, given, states, keys, *others)
  found = accelerators.count_launches(compiled.as_text())
  assert found.loop_iterations == found.conditionals == 0
  lines = compiled.as_text().splitlines()
  assert sum("decoder_" in line and " custom-call(" in line for line in lines) == 4
