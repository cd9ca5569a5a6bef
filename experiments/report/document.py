"""The page itself: one file that loads nothing, from sections."""

import functools
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .. import workdir
from . import charts, glossary, markup

FOLDER = pathlib.Path(__file__).parent
# The browser itself refuses what is not in the file; Vega makes functions of its expressions.
POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval';"
  " img-src data:"
)


class Section(NamedTuple):
  """A part of the page: its name in links, its title, and HTML."""

  name: str
  title: str
  body: str


@functools.cache
def _own(suffix: str) -> str:
  return (FOLDER / f"report.{suffix}").read_text(encoding="utf-8")


def write(
  path: pathlib.Path,
  title: str,
  words: Mapping[str, str],
  sections: Sequence[Section],
  names: Sequence[str],
) -> pathlib.Path:
  """Writes the page.

  Args:
    path: of the file.
    title: its heading.
    words: what was done, by heading.
    sections: its parts; the first one stands alone at the top.
    names: the metrics that it speaks of, for the glossary.

  Returns:
    The path.
  """
  versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in workdir.LIBRARIES)
  told = {**words, "versions": versions}
  sections = [*sections, Section("protocol", "How it was done", _list(told, "facts"))]
  text = "".join(section.body for section in sections)
  meanings = _list(glossary.entries(names, text), "terms")
  sections.append(Section("glossary", "Glossary", meanings))
  links = "".join(f'<a href="#{s.name}">{markup.text(s.title)}</a>' for s in sections[1:])
  body = "".join(
    f'<section id="{s.name}"><h2>{markup.text(s.title)}</h2>{s.body}</section>' for s in sections
  )
  page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{markup.text(title)}</title>
<style>{_own("css")}</style>
</head>
<body>
<header>
<h1>{markup.text(title)}</h1>
<div class="theme" role="group" aria-label="colours">
<button type="button" data-theme="auto" aria-pressed="true">Auto</button>
<button type="button" data-theme="light" aria-pressed="false">Light</button>
<button type="button" data-theme="dark" aria-pressed="false">Dark</button>
</div>
<nav aria-label="sections">{links}</nav>
</header>
<main>{body}</main>
<noscript><p>Figures and sorting need JavaScript; every number is in the tables.</p></noscript>
<script>{charts.library()}</script>
<script>{_own("js")}</script>
</body>
</html>
"""
  path.write_text(page, encoding="utf-8")
  return path


def _list(told: Mapping[str, str], style: str) -> str:
  items = "".join(
    f"<dt>{markup.text(name)}</dt><dd>{markup.text(value)}</dd>" for name, value in told.items()
  )
  return f'<dl class="{style}">{items}</dl>'
