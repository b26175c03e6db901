"""The site: its examples run, its commands exist, and every public name is documented."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import jax
import pytest

import sa_jax
from sa_jax import cli
from sa_jax.config import PRESETS
from sa_jax.formats.families import FAMILIES
from sa_jax.mesh import MeshSizes
from sa_jax.ops.attention import dispatch
from tests import pages

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", *sorted(ROOT.glob("experiments/**/README.md"))]
PUBLIC = sorted(
  ".".join(path.parent.relative_to(ROOT).parts)
  for path in (ROOT / "sa_jax").rglob("__init__.py")
  if "__all__" in path.read_text(encoding="utf-8")
)


def data_docstrings() -> set[str]:
  """Names of data, in any module, that have a docstring after their assignment."""
  found = set()
  for path in (ROOT / "sa_jax").rglob("*.py"):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node, after in zip(body, body[1:]):
      if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
          found |= {target.id for target in targets if isinstance(target, ast.Name)}
  return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_documented(module):
  public = importlib.import_module(module)
  assert public.__doc__, f"{module} has no docstring"
  described = data_docstrings()
  missing = []
  for name in public.__all__:
    value = getattr(public, name)
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
      documented = bool(value.__doc__) and not value.__doc__.startswith(f"{name}(")  # a dataclass's own signature
    else:
      documented = name in described or (type(value).__module__.startswith("jax") and bool(value.__doc__))
    if not documented:
      missing.append(name)
  assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/quick-start.md", "docs/how-to/composing.md", "docs/extend/recovery.md"])
@pytest.mark.real_model
def test_examples_print_what_the_page_says(page, smollm2):
  # As in a reader's session: optax promotes numbers implicitly.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    assert pages.failures(ROOT / page) == ""


@pytest.mark.parametrize("page", ["family", "backend"])
def test_guides_work_as_they_are_written(page):
  """They add a family and a backend, which other tests must not see."""
  try:
    assert pages.failures(ROOT / "docs" / "extend" / f"{page}.md") == ""
  finally:
    FAMILIES.pop("aquila", None)
    dispatch.backends.pop("jax_nn", None)


def shell_lines(text: str) -> list[list[str]]:
  """The commands of shell blocks, which are fenced or indented."""
  blocks = re.findall(r"```(?:sh|bash)?\n(.*?)```", text, re.DOTALL)
  prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
  blocks += re.findall(r"^ {4}(?=[^ ])(.*(?:\n {4}.*)*)", prose, re.MULTILINE)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  lines = [line[5:-1] if line.startswith('run="') else line for line in lines]
  return [shlex.split(line, comments=True) for line in lines if re.match(r"\s*(sa-jax|python) (?!-c)", line)]


def commands(text: str) -> list[list[str]]:
  """What is given to sa-jax in shell blocks."""
  return [rest for program, *rest in shell_lines(text) if program == "sa-jax"]


@functools.cache
def flags_of(command: str) -> frozenset[str]:
  """The flags that a command's help names; none if there is no such command."""
  told = io.StringIO()
  with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
    cli.main([command, "--help"])
  return frozenset(re.findall(r"--[a-z0-9-]+", told.getvalue())) if ended.value.code == 0 else frozenset()


def test_commands_and_flags_of_the_pages_exist():
  seen = set()
  for page in PAGES:
    for command, *rest in commands(page.read_text(encoding="utf-8")):
      unknown = {word.split("=")[0] for word in rest if word.startswith("--")} - flags_of(command)
      assert flags_of(command), f"{page.name}: there is no command {command}"
      assert not unknown, f"{page.name}: sa-jax {command} has no {unknown}"
      seen.add(command)
  assert len(seen) >= 8


def test_flags_that_sentences_name_exist():
  known = frozenset().union(*(flags_of(command) for command in cli._COMMANDS))
  known |= {"--version", "--no-compilation-cache", "--tyro-print-completion"}
  for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {
      flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code)
    }
    assert not named - known, f"{page.name}: there is no {named - known}"


def test_plans_of_the_pages_fit_the_layers_beside_them():
  seen = 0
  for page in PAGES:
    for words in commands(page.read_text(encoding="utf-8")):
      if "--plan" in words and "--model" in words and words[words.index("--model") + 1] in PRESETS:
        layers = sa_jax.ModelConfig.preset(words[words.index("--model") + 1]).num_layers
        layers = int(words[words.index("--layers") + 1]) if "--layers" in words else layers
        for plan in itertools.takewhile(lambda word: not word.startswith("-"), words[words.index("--plan") + 1 :]):
          sa_jax.SharingPlan.parse(plan, layers)
          seen += 1
  assert seen >= 5


def test_every_extra_of_users_is_told():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  told = re.findall(
    r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", (ROOT / "docs/how-to/install.md").read_text(), re.M))
  )
  ours = {"test", "test-torch", "lint", "docs", "browser", "notebooks"}  # `make` installs them
  assert set(told) == project["optional-dependencies"].keys() - ours


def test_scripts_of_the_pages_exist_with_their_flags():
  seen = set()
  for page in [*PAGES, ROOT / "BUILD.md"]:
    for program, script, *rest in shell_lines(page.read_text(encoding="utf-8")):
      if program == "python" and script.endswith(".py"):
        path = next((folder / script for folder in (ROOT, page.parent) if (folder / script).is_file()), None)
        assert path is not None, f"{page}: there is no {script}"
        source = path.read_text(encoding="utf-8")
        beside = (path.parent / f"{name}.py" for name in re.findall(r"^from (\w+) import", source, re.MULTILINE))
        source += "".join(each.read_text(encoding="utf-8") for each in beside if each.is_file())
        flags = {word.split("=")[0] for word in rest if word.startswith("--")} - {"--help"}
        unknown = {flag for flag in flags if f'"{flag}"' not in source}
        assert not unknown, f"{page}: {script} has no {unknown}"
        seen.add(script)
  assert len(seen) >= 10


def test_under_slurm_each_process_has_a_gpu_and_the_mesh_has_all():
  text = (ROOT / "experiments" / "pods" / "slurm.sh").read_text(encoding="utf-8")
  asked = {name: int(count) for name, count in re.findall(r"#SBATCH --([\w-]+)=(\d+)$", text, re.MULTILINE)}
  assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # a task has the GPU of its number, as JAX starts it
  meshes = re.findall(r"--mesh (\S+)", text)
  assert {MeshSizes.parse(mesh).size for mesh in meshes} == {asked["nodes"] * asked["gpus-per-node"]}


def test_what_the_commands_of_experiments_read_is_told():
  """Variables are set on the page, or on the page of all experiments; a file of the model's is a variable."""
  folder = ROOT / "experiments"
  told = set(re.findall(r"export (\w+)=", (folder / "README.md").read_text(encoding="utf-8")))
  assert told == {"SMOLLM2", "SA_JAX_DATA"}
  for page in folder.glob("*/README.md"):
    text = page.read_text(encoding="utf-8")
    words = [word for line in shell_lines(text) for word in line]
    used = {name for word in words for name in re.findall(r"\$\{?(\w+)", word)}
    assert used - told <= set(re.findall(r"\bfor (\w+) in", text)), page
    assert not [word for word in words if "SmolLM2" in word], page


def test_experiments_import_what_there_is():
  missing = []
  for path in (ROOT / "experiments").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sa_jax":
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
          if not hasattr(module, name) and importlib.util.find_spec(f"{node.module}.{name}") is None:
            missing.append(f"{path.name}: {node.module}.{name}")
  assert not missing


def test_links_between_pages_lead_somewhere():
  made = {f"reference/{module}.md" for module in PUBLIC} | {"benchmarks.md", "changelog.md"}
  made |= {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.py")}
  made |= set(re.findall(r"models/[\w.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
  for page in (ROOT / "docs").rglob("*.md"):
    for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
      found = (page.parent / target).resolve()
      assert found.is_file() or (found.is_relative_to(ROOT / "docs") and str(found.relative_to(ROOT / "docs")) in made)


def test_the_walks_name_what_there_is():
  text = (ROOT / "docs" / "design" / "walks.md").read_text(encoding="utf-8")
  walks = [part.splitlines() for part in text.split("\n## ")[1:]]
  assert [sum(line[0].isdigit() for line in walk if line) for walk in walks] == [10] * 5
  for line in text.splitlines():
    for file, names in re.findall(r"`(sa_jax/[\w/]+\.py)`((?:,| and| `\w+`)*)", line):
      tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
      defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
      assert set(re.findall(r"`(\w+)`", names)) <= defined, f"{file} does not define all of {names}"


def test_versions_agree():
  project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
  assert f'version = "{sa_jax.__version__}"' in project
  assert f"version: {sa_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_results_are_what_the_files_of_the_experiment_hold():
  folder = ROOT / "experiments" / "efficiency"
  spec = importlib.util.spec_from_file_location("tables", folder / "tables.py")
  tables = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tables)
  assert (folder / "RESULTS.md").read_text(encoding="utf-8") == tables.results(), "run experiments/efficiency/tables.py"
