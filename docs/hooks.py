"""Pages that are written elsewhere: the notebooks, the library's modules, the changelog."""

import json
import pathlib

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]


def on_files(files: Files, config) -> Files:
  """Adds the pages to those of this folder."""
  pages = {"changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    pages[f"tutorials/{path.stem}.md"] = _tutorial(path)
  for module in modules():
    name = module.removeprefix("mmjax.")
    pages[f"api/{name}.md"] = f"# {name}\n\n::: {module}\n"
  for path, text in pages.items():
    files.append(File.generated(config, path, content=text))
  return files


def modules() -> list[str]:
  """The public modules of the library."""
  paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "mmjax").rglob("*.py"))
  names = (".".join(path.parts).removesuffix(".__init__") for path in paths)
  return sorted(name for name in names if "._" not in name)


def _tutorial(path: pathlib.Path) -> str:
  """A notebook's text and code; it is not run."""
  parts = []
  for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
    text = "".join(cell["source"]).strip()
    parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
  return "\n\n".join(parts) + "\n"
