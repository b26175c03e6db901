"""Notebooks: Python files in ``docs/notebooks``, in jupytext's percent format, made into pages.

``python docs/hooks/notebooks.py [NAME …]`` runs them and keeps what they print in ``build/notebooks``. A page shows it
where its notebook has been run as it is; otherwise it shows the code alone.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jupytext

if TYPE_CHECKING:
  from mkdocs.config.defaults import MkDocsConfig
  from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
BUILT = ROOT / "build" / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds a page for every notebook, its pictures, and the notebook itself to download."""
  from mkdocs.structure.files import File

  for source in SOURCES:
    where = f"notebooks/{source.stem}"
    text, pictures = page(source.stem, executed(source) or jupytext.read(source))
    files.append(File.generated(config, f"{where}.md", content=text))
    plain = jupytext.writes(jupytext.read(source), fmt="ipynb")
    files.append(File.generated(config, f"{where}.ipynb", content=plain))
    for name, image in pictures.items():
      files.append(File.generated(config, f"notebooks/{name}", content=image))
  return files


def page(name: str, notebook: Any) -> tuple[str, dict[str, bytes]]:
  """The Markdown of a notebook's page, and its pictures by file name."""
  parts, pictures = [], {}
  for number, cell in enumerate(notebook.cells):
    if cell.cell_type == "markdown":
      parts.append(cell.source)
      continue
    parts.append(fenced("python", cell.source))
    for output in cell.get("outputs", []):
      data = output.get("data", {})
      if WIDGET in data or (data and not data.get("text/plain", "").strip()):
        continue  # a progress bar, which is gone
      if output.output_type == "stream" and output.name == "stdout":
        parts.append(fenced("text", output.text))
      elif "image/png" in data:
        picture = f"{name}-{number}.png"
        pictures[picture] = base64.b64decode(data["image/png"])
        parts.append(f"![{cell.metadata['alt']}]({picture})")
      elif "text/html" in data:
        parts.append(f'<div class="output">{data["text/html"]}</div>')
      elif "text/plain" in data:
        parts.append(fenced("text", data["text/plain"]))
  title, *rest = parts[0].split("\n", 1)
  note = f"[This page as a notebook]({name}.ipynb){{ download }}"
  return "\n\n".join([title, note, *rest, *parts[1:]]) + "\n", pictures


def fenced(language: str, text: str) -> str:
  """A code block."""
  kind = " .output" if language == "text" else ""
  return f"```{{ .{language}{kind} }}\n{text.rstrip()}\n```"


def checksum(source: Path) -> str:
  """Of what a notebook says."""
  return hashlib.sha256(source.read_bytes()).hexdigest()


def executed(source: Path) -> Any:
  """The notebook with what it printed; None if it has not been run as it is."""
  path = BUILT / f"{source.stem}.ipynb"
  if not path.exists():
    return None
  notebook = jupytext.read(path)
  return notebook if notebook.metadata.get("source") == checksum(source) else None


def execute(source: Path) -> float:
  """Runs a notebook in a process of its own, keeps it in ``build/notebooks``, and tells the seconds it took.

  Raises:
    nbclient.exceptions.CellExecutionError: if a cell fails.
  """
  import nbclient

  began = time.perf_counter()
  notebook = jupytext.read(source)
  notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
  nbclient.NotebookClient(notebook, timeout=600).execute()
  notebook.metadata["source"] = checksum(source)
  BUILT.mkdir(parents=True, exist_ok=True)
  jupytext.write(notebook, BUILT / f"{source.stem}.ipynb")
  return time.perf_counter() - began


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="Runs notebooks of docs/notebooks; all of them if none is named.")
  parser.add_argument("names", nargs="*", metavar="NAME", help="such as 4-blocks")
  names = parser.parse_args().names
  for source in SOURCES:
    if not names or source.stem in names:
      print(f"{source.stem}: {execute(source):.0f} s", flush=True)
