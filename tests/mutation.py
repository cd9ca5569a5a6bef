"""Puts small faults into a module, one at a time, and tells which ones its tests do not notice.

  python tests/mutation.py mmjax/losses.py … --count=12 [--tests='tests/losses_test.py -k …']

A fault is one changed operator, comparison, number, condition, keyword, statement or call.
Everything heavy is imported once; each fault then has a forked process, in which the module is
compiled from a changed syntax tree: the files stay as they are. The tests run up to the first that
fails, the quick ones first. Docstrings, annotations, assertions and what stands in a `raise` are
left alone. A survivor wants an assertion, unless it changes nothing that anybody could see.
"""

import argparse
import ast
import copy
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import random
import shlex
import signal
import sys
import tempfile
import time
import warnings

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401, I001  JAX's settings, before JAX
import chex  # noqa: E402, F401
import flax.linen  # noqa: E402, F401
import jax  # noqa: E402, F401
import optax  # noqa: E402, F401
import pytest  # noqa: E402
import scipy.stats  # noqa: E402, F401

OPERATORS = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.Add,
  ast.Pow: ast.Mult,
  ast.BitAnd: ast.BitOr,
  ast.BitOr: ast.BitAnd,
  ast.And: ast.Or,
  ast.Or: ast.And,
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
  ast.In: ast.NotIn,
  ast.NotIn: ast.In,
}


# names of modules: `jnp.f(x)` is a function of x, `x.f()` one of x too
MODULES = {
  "np",
  "jnp",
  "jax",
  "optax",
  "functools",
  "data",
  "optim",
  "metrics",
  "types",
  "parallel",
}


def replacements(node: ast.AST):
  """Faulty versions of one node."""

  def changed(**fields):
    found = copy.copy(node)
    for name, value in fields.items():
      setattr(found, name, value)
    return found

  match node:
    case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
      yield changed(op=OPERATORS[type(op)]())
    case ast.Compare(ops=[op]):
      yield changed(ops=[OPERATORS[type(op)]()])
    case ast.UnaryOp(operand=operand):
      yield operand
    case ast.Constant(value=bool(value)):
      yield changed(value=not value)
    case ast.Constant(value=int(value) | float(value)):
      yield changed(value=value + 1)
    case ast.IfExp(body=body, orelse=orelse):
      yield changed(body=orelse, orelse=body)
    case ast.If(test=test) | ast.While(test=test):
      yield changed(test=ast.UnaryOp(ast.Not(), test))
    case ast.Call(func=ast.Attribute(value=receiver), keywords=[]) if not _is_module(receiver):
      yield receiver
    case ast.Call(func=ast.Name(id="len" | "range" | "enumerate" | "list" | "tuple" | "next")):
      pass  # nothing runs without them
    case ast.Call(args=[only], keywords=[]) if not isinstance(only, ast.Starred):
      yield only
    case ast.Expr():
      yield ast.Pass()
    case ast.Assign(targets=[target], value=value) if _names(target) & _names(value):
      yield ast.Pass()  # what only changes a name: without the first, nothing would run
  if isinstance(node, ast.AugAssign):
    yield ast.Pass()
  if isinstance(node, ast.Call):
    for n, keyword in enumerate(node.keywords):
      if keyword.arg is not None:
        yield changed(keywords=node.keywords[:n] + node.keywords[n + 1 :])


def _is_module(node: ast.AST) -> bool:
  while isinstance(node, ast.Attribute):
    node = node.value
  return isinstance(node, ast.Name) and node.id in MODULES


def _names(node: ast.AST) -> set[str]:
  return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def sites(node: ast.AST, inside=False):
  """`(parent, field, place in a list or None, node)` of all that may be changed in functions."""
  for field, value in ast.iter_fields(node):
    if field in ("annotation", "returns", "decorator_list", "format_spec"):
      continue
    for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
      if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
        continue
      if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        continue  # a docstring
      if isinstance(child, ast.Expr) and ast.unparse(child).startswith("chex.assert_"):
        continue
      within = inside or isinstance(child, ast.FunctionDef)
      if inside:
        yield node, field, place, child
      yield from sites(child, within)


def faults(source: str):
  """`(line, description, function that makes the changed tree)` of every possible fault."""
  tree = ast.parse(source)
  for parent, field, place, node in list(sites(tree)):
    for new in replacements(node):
      told = f"{_line(node)}  →  {_line(new)}"
      if isinstance(node, ast.Call) and node.keywords:
        (lost,) = set(node.keywords) - set(new.keywords)  # all else that changes a call has none
        told = f"{_line(node.func)}(…)  without {lost.arg}"
      yield node.lineno, told, functools.partial(_changed, tree, parent, field, place, node, new)


def _line(node: ast.AST) -> str:
  return ast.unparse(node).splitlines()[0]


def _changed(tree, parent, field, place, node, new):
  """A copy of the tree with `new` in the node's place."""
  ast.copy_location(new, node)

  def put(what):
    if place is None:
      setattr(parent, field, what)
    else:
      getattr(parent, field)[place] = what

  put(new)
  changed = ast.fix_missing_locations(copy.deepcopy(tree))
  put(node)
  return changed


class Changed(importlib.abc.MetaPathFinder):
  """Finds one module, compiled from a tree."""

  def __init__(self, name, path, tree):
    self.name, self.path, self.tree = name, str(path), tree

  def find_spec(self, fullname, path=None, target=None):
    del path, target
    if fullname != self.name:
      return None
    loader = importlib.machinery.SourceFileLoader(self.name, self.path)
    code = compile(self.tree, self.path, "exec")
    loader.get_code = lambda fullname: code  # type: ignore[method-assign]
    return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


class QuickFirst:
  """A plugin of pytest: writes down how long each test takes, and sorts them by what is known."""

  def __init__(self, path, known):
    self.path, self.known, self.took = path, known, {}

  @pytest.hookimpl(trylast=True)
  def pytest_collection_modifyitems(self, items):
    items.sort(key=lambda item: self.known.get(item.nodeid, 0))

  def pytest_runtest_logreport(self, report):
    self.took[report.nodeid] = self.took.get(report.nodeid, 0) + report.duration

  def pytest_sessionfinish(self):
    self.path.write_text(json.dumps(self.took))


def run(tests, limit, plugin, finder=None):
  """pytest's exit code in a forked process, and its seconds; None after `limit`."""
  began, child = time.monotonic(), os.fork()
  if not child:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
      os.dup2(null, stream)
    os.setsid()
    if finder:
      sys.meta_path.insert(0, finder)
    args = [*tests, "-x", "-n0", "-p", "no:cacheprovider"]
    os._exit(int(pytest.main(args, plugins=[plugin])))
  while time.monotonic() - began < limit:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status), time.monotonic() - began
    time.sleep(0.05)
  os.killpg(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return None, limit


def own_tests(path: pathlib.Path) -> str:
  """The test file of a module, or of the package that it stands in."""
  own = (f"tests/{name}_test.py" for name in (path.stem, path.parent.name))
  return next(test for test in own if (ROOT / test).exists())


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("modules", type=pathlib.Path, nargs="+")
  parser.add_argument("--tests", help="pytest's arguments, by default the first's own test file")
  parser.add_argument("--count", type=int, default=12, help="how many faults, drawn at random")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--skip", type=int, default=0, help="leave out the first faults drawn")
  args = parser.parse_args()
  paths = [path.resolve() for path in args.modules]
  tests = shlex.split(args.tests or own_tests(paths[0]))
  warnings.simplefilter("ignore")  # forks: nothing runs here yet
  os.chdir(ROOT)
  with tempfile.TemporaryDirectory() as folder:
    took = pathlib.Path(folder) / "took.json"
    code, usual = run(tests, 3600, QuickFirst(took, {}))
    if code:
      sys.exit(f"error: the tests fail without any fault (exit code {code}).")
    plugin = QuickFirst(took, json.loads(took.read_text()))
    print(f"{usual:.0f} s without a fault", flush=True)
    found = [(path, *fault) for path in paths for fault in faults(path.read_text("utf-8"))]
    drawn = random.Random(args.seed).sample(found, min(args.count, len(found)))[args.skip :]
    caught = 0
    for path, line, told, change in drawn:
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
      code, seconds = run(tests, 2 * usual + 30, plugin, Changed(name, path, change()))
      caught += code != 0
      told = f"{seconds:4.0f} s  {path.relative_to(ROOT)}:{line}  {told}"
      print(f"{'caught' if code else 'LIVES'} {told}", flush=True)
  print(f"{caught} of {len(drawn)} caught ({len(found)} possible)")


if __name__ == "__main__":
  main()
