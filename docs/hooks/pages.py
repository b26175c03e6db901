"""Pages that are made from other files: reference of every public module, changelog, benchmarks and model cards.

A module is public if it has ``__all__``. Its page has its docstring and one section a name; mkdocstrings fills them
from docstrings and signatures, without an import.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def public_modules() -> dict[str, ast.Module]:
  """The modules with ``__all__``, by name, the package itself first."""
  found = {}
  for path in sorted((ROOT / "sa_jax").rglob("__init__.py")):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if public_names(tree):
      found[".".join(path.parent.relative_to(ROOT).parts)] = tree
  return dict(sorted(found.items()))


def public_names(tree: ast.Module) -> list[str]:
  """What ``__all__`` lists."""
  for node in tree.body:
    if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets):
      return list(ast.literal_eval(node.value))
  return []


def origin(module: str, name: str) -> str:
  """Where a name is defined, followed through the packages that pass it on."""
  path = ROOT.joinpath(*module.split("."))
  file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
  for node in ast.parse(file.read_text(encoding="utf-8")).body:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sa_jax."):
      for alias in node.names:
        if (alias.asname or alias.name) == name and node.module != module:
          return origin(node.module, alias.name)
  return f"{module}.{name}"


def page(module: str, modules: dict[str, ast.Module]) -> str:
  """The Markdown of a module's page."""
  tree = modules[module]
  parts = [f"# {module}", ast.get_docstring(tree) or ""]
  for name in public_names(tree):
    full, defined = f"{module}.{name}", origin(module, name)
    if full in modules:
      parts.append(f"## {name}\n\nA module: see [{full}]({full}.md).")
    elif not defined.endswith(f".{name}.{name}"):
      parts.append(f"::: {full}")
    elif module == "sa_jax":
      # Its module has its name, and would be found instead.
      parts.append(f"::: {defined}")
    else:
      parts.append(f"## {name}\n\nSee [sa_jax.{name}](sa_jax.md#{defined}).")
  return "\n\n".join(parts) + "\n"


def quality() -> ModuleType:
  """``experiments/quality.py``, which makes tables and model cards of the experiments' results."""
  spec = importlib.util.spec_from_file_location("quality", ROOT / "experiments" / "quality.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their module up
  spec.loader.exec_module(module)
  return module


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Puts the pages of the reference and of the design into the navigation."""
  design = sorted((ROOT / "docs" / "design").glob("*.md"), key=lambda path: (path.stem != "index", path.stem))
  listed = {
    "reference/": [{module: f"reference/{module}.md"} for module in public_modules()],
    "design/": [f"design/{path.name}" for path in design],
  }
  config.nav = [
    {title: listed.get(target, target) if isinstance(target, str) else target}
    for entry in config.nav
    for title, target in entry.items()
  ]
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are not in ``docs``."""
  modules = public_modules()
  for module in modules:
    files.append(File.generated(config, f"reference/{module}.md", content=page(module, modules)))
  changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  files.append(File.generated(config, "changelog.md", content=changelog))
  made = quality()
  results = (ROOT / "experiments" / "efficiency" / "RESULTS.md").read_text(encoding="utf-8")
  _, results = results.split("\n", 1)  # its title is of a page of its own
  files.append(File.generated(config, "benchmarks.md", content=f"{made.overview()}\n\n{results}"))
  for key in made.CARDS:
    files.append(File.generated(config, f"models/{key}.md", content=made.card_page(key)))
  return files
