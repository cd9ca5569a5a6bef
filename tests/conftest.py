"""Fixtures that several test files share, and JAX's settings for all of them."""

import gc
import importlib.metadata
import os
import pathlib
import re

# Before JAX is imported, and for the processes that tests start: strict promotion. Compiling costs
# most of the time, and half of it is optimizing, which tiny shapes do not need; programs are kept
# for other workers and the next run of pytest.
PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # a third of the time again, and what splitting programs for idle cores costs; XLA stops at a flag
  # that it does not know, so not for other versions
  flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Tracing makes many objects, hardly any of which is garbage; a tenth of the time went into looking.
gc.set_threshold(100_000, 20, 100)

# In the processes of tests and in this one alike: binaries would make a device of every core, which
# changes the last bits of a training. And they find `experiments`, and `toy`.
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
HERE = pathlib.Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
  filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])
)

import pytest  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

# Files whose systems share no program: tests of one system stay together, not the whole file.
BY_SYSTEM = ("models_test.py", "parity_test.py")


# What takes long in one process, or waits for others, begins first: taken last, it ends last.
FIRST = (
  "tune_test.py",
  "studies_test.py",
  "binaries_test.py",
  "notebooks_test.py",
  "parallel_test.py",
  "hrlf_test.py",
  "packaging_test.py",
  "train_test.py",
)


def pytest_collection_modifyitems(items):
  order = {name: place for place, name in enumerate(FIRST)}
  items.sort(key=lambda item: order.get(item.path.name, len(order)))


class ByProgram(LoadScopeScheduling):
  """Tests that share compiled programs run in one process."""

  def _split_scope(self, nodeid):
    path, _, test = nodeid.partition("::")
    system = re.search(r"\[(\w+)", test) if path.endswith(BY_SYSTEM) else None
    return f"{path}:{system[1]}" if system else path


def pytest_xdist_make_scheduler(config, log):
  return ByProgram(config, log) if config.getvalue("dist") == "loadscope" else None


SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared():
  """`shared(path)`: a file of ../shared. Without it a test skips; in CI (CI=true) it fails."""

  def find(path):
    path = SHARED / path
    if not path.exists():
      tell = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
      tell(f"{path} is not here")
    return path

  return find


@pytest.fixture(scope="session")
def convert():
  """`convert(folder, name, rows)`: synthetic data as `folder/NAME.pkl` and as a dataset there."""

  def write(folder, name, rows, seed=1, **kwargs):
    from data_prep import convert
    from mmjax import synthetic

    sizes = dict(zip(("num_train", "num_valid", "num_test"), rows, strict=True))
    arrays = synthetic.make_arrays(seed=seed, **sizes)
    path = synthetic.write_pickle(folder / f"{name}.pkl", arrays)
    convert.convert(path, name, folder, **kwargs)

  return write


@pytest.fixture(scope="session")
def tiny(convert, tmp_path_factory):
  """A folder with the dataset "tiny"."""
  folder = tmp_path_factory.mktemp("tiny")
  convert(folder, "tiny", (64, 24, 24))
  return folder


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
  """A folder for runs; its folder "data" has the file of the dataset "tiny".

  Not its conversion: to import TensorFlow takes every process longer than to train the toy.
  """
  folder = tmp_path_factory.mktemp("runs")
  (folder / "data").mkdir()
  (folder / "data" / "tiny.pkl").symlink_to(tiny / "tiny.pkl")
  return folder
