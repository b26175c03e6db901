"""The structure of sa_jax in numbers: how deep its calls go, and what makes a module hard to read.

    python tests/structure.py [--json FILE]

* Depth: how many of our own functions are on the stack at once while logits, a decode step and a train step of a tiny
  model are traced. Lambdas and comprehensions are not counted.
* Functions of seven parameters or more, without ``self`` and ``cls``. Pallas kernels are counted apart: each of their
  parameters is a reference to an array. A kernel is a function whose name ends in ``_kernel``.
* How often ``Any`` stands in the code, its imports left out.
* Circles of imports between modules, those inside functions included.
* Imports against the order of layers: errors, files, fields and trees, then `ops`, then plan, config and the layouts of
  parameters, then `nn`, then everything else, then what a user sees: `cli` and the names of `sa_jax` itself.
* Modules of more than 400 lines.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

LAYERS = (
  ("errors", "buckets", "files", "fields", "trees", "bars", "display", "durations"),
  ("ops",),
  ("plan", "config", "params"),
  ("nn",),
)
"""Parts of sa_jax from the bottom; above them all others, and on top those of `TOP`."""
TOP = ("cli", "__main__", "")
MOST_PARAMETERS, MOST_LINES = 6, 400


def deepest(root: Path, call: Callable[[], object]) -> list[str]:
  """The longest stack of functions defined under ``root`` while something is called, outermost first."""
  stack: list[str] = []
  longest: list[str] = []

  def watch(frame, event: str, _) -> None:
    nonlocal longest
    code = frame.f_code
    if event not in ("call", "return") or code.co_name.startswith("<") or not code.co_filename.startswith(f"{root}/"):
      return
    if event == "return":
      stack.pop()
      return
    stack.append(f"{Path(code.co_filename).relative_to(root)}: {code.co_qualname}")
    if len(stack) > len(longest):
      longest = list(stack)

  sys.setprofile(watch)
  try:
    call()
  finally:
    sys.setprofile(None)
  return longest


def depths(root: Path) -> dict[str, list[str]]:
  """The longest stacks on the way to logits, in a decode step and in a train step of a tiny model."""
  import jax
  import jax.numpy as jnp
  import optax

  import sa_jax
  from sa_jax.sharding import abstract_params
  from sa_jax.train import Batch, make_state, make_step, next_token

  config = sa_jax.ModelConfig(
    vocab_size=61, embed_dim=32, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_length=64
  )
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.parse("1:2-3,4:5-6", 7))
  tokens, one, mask = (jax.ShapeDtypeStruct(*of) for of in (((2, 16), "int32"), ((2,), "int32"), ((2, 16), "float32")))
  params, layers = abstract_params(model), abstract_params(model, layout="layers")
  optimizer = optax.sgd(1.0)
  step = make_step(next_token(model), optimizer)

  def decode_step(params, tokens, cache, positions):
    return model.apply({"params": params}, tokens, cache, positions, method=sa_jax.Transformer.step)

  cache = jax.eval_shape(lambda: sa_jax.nn.Cache.empty(config, model.plan, 2, 64))
  state = jax.eval_shape(lambda params: make_state(optimizer, params), params)
  logits = lambda params, tokens: model.apply({"params": params}, jnp.asarray(tokens))
  return {
    "logits": deepest(root, lambda: jax.eval_shape(logits, params, tokens)),
    "decode step": deepest(root, lambda: jax.eval_shape(decode_step, layers, one, cache, one)),
    "train step": deepest(root, lambda: step.trace(state, None, Batch(tokens, mask))),
  }


def modules(root: Path) -> dict[str, ast.Module]:
  """Every module of the package, by its name below the package; the package itself is the empty name."""
  found = {}
  for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
  return found


def long_signatures(trees: dict[str, ast.Module]) -> tuple[list[str], list[str]]:
  """Functions with too many parameters, as ``module.function (number)``: ours, and Pallas kernels."""
  ours, kernels = [], []
  for module, tree in trees.items():
    for node in ast.walk(tree):
      if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        continue
      of = node.args
      names = [name.arg for name in (*of.posonlyargs, *of.args, of.vararg, *of.kwonlyargs, of.kwarg) if name]
      if (number := len([name for name in names if name not in ("self", "cls")])) > MOST_PARAMETERS:
        (kernels if node.name.endswith("_kernel") else ours).append(f"{module}.{node.name} ({number})")
  return ours, kernels


def count_any(trees: dict[str, ast.Module]) -> dict[str, int]:
  """How often each module says ``Any``, where it does."""
  names = {
    module: sum(
      (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
      for node in ast.walk(tree)
    )
    for module, tree in trees.items()
  }
  return {module: number for module, number in names.items() if number}


def imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
  """The modules of the package that a module imports, inside functions too, but not for type checkers alone."""
  unseen = {
    inner
    for node in ast.walk(tree)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for inner in ast.walk(node)
  }
  for node in ast.walk(tree):
    if node in unseen:
      continue
    if isinstance(node, ast.Import):
      named = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
      of = [f"{node.module}.{alias.name}" for alias in node.names]
      named = [full if full.removeprefix("sa_jax.") in known else node.module for full in of]
    else:
      continue
    for full in named:
      if full == "sa_jax" or full.startswith("sa_jax."):
        yield full.removeprefix("sa_jax").removeprefix(".")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
  """The sets of modules that import one another, directly or through others (Tarjan's strong components)."""
  index: dict[str, int] = {}
  low: dict[str, int] = {}
  stack: list[str] = []
  found = []

  def visit(module: str) -> None:
    index[module] = low[module] = len(index)
    stack.append(module)
    for other in sorted(graph[module]):
      if other not in index:
        visit(other)
        low[module] = min(low[module], low[other])
      elif other in stack:
        low[module] = min(low[module], index[other])
    if low[module] == index[module]:
      at = stack.index(module)
      if len(stack) - at > 1:
        found.append(sorted(stack[at:]))
      del stack[at:]

  for module in graph:
    if module not in index:
      visit(module)
  return found


def layer(module: str) -> int:
  """How high a module stands."""
  part = module.split(".")[0]
  if part in TOP:
    return len(LAYERS) + 1
  return next((number for number, parts in enumerate(LAYERS) if part in parts), len(LAYERS))


def measure() -> dict[str, object]:
  """Everything, under the names of the table."""
  import sa_jax

  root = Path(sa_jax.__file__).parent
  trees = modules(root)
  graph = {module: set(imports(module, tree, set(trees))) - {module} for module, tree in trees.items()}
  ours, kernels = long_signatures(trees)
  length = lambda path: len(path.read_text().splitlines())
  return {
    "depth": depths(root),
    "functions of 7 or more parameters": ours,
    "kernels of 7 or more parameters": kernels,
    "Any": count_any(trees),
    "import circles": circles(graph),
    "upward imports": [
      f"{module} imports {other or 'sa_jax'}"
      for module, others in graph.items()
      for other in sorted(others)
      if layer(other) > layer(module)
    ],
    "modules over 400 lines": {
      str(path.relative_to(root)): length(path) for path in sorted(root.rglob("*.py")) if length(path) > MOST_LINES
    },
  }


def numbers(found: dict[str, object]) -> dict[str, int]:
  """What `measure` found, counted."""
  counts = {f"depth: {name}": len(stack) for name, stack in found["depth"].items()}
  for name, value in found.items():
    if name != "depth":
      counts[name] = sum(value.values()) if name == "Any" else len(value)
  return counts


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers and what is behind them")
  file = parser.parse_args().json
  found = measure()
  counted = numbers(found)
  for name, number in counted.items():
    print(f"{number:5}  {name}")
  for name in ("functions of 7 or more parameters", "import circles", "upward imports", "modules over 400 lines"):
    for each in found[name]:
      print(f"{name}: {', '.join(each) if isinstance(each, list) else each}")
  if file:
    file.write_text(json.dumps({"numbers": counted, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
  main()
