"""The package stays as easy to follow as it is: `structure.py` counts, and this file says what it may count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import structure

CEILINGS = {
  "depth: logits": 15,
  "depth: decode step": 11,
  "depth: train step": 19,
  # `convert` says, as `from_pretrained`, how strictly a config is read; `make_mesh` has a size for each axis.
  "functions of 7 or more parameters": 9,
  "kernels of 7 or more parameters": 0,
  "Any": 184,
  "import circles": 0,
  "upward imports": 0,
  "modules over 400 lines": 0,
}
"""Lower one when the number falls; to raise one is to say why."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """Measured in a process of its own: what this one has traced already would not be traced again."""
  file = tmp_path_factory.mktemp("structure") / "numbers.json"
  done = subprocess.run([sys.executable, structure.__file__, "--json", file], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text())


def test_no_number_is_above_its_ceiling(report):
  over = {name: number for name, number in report["numbers"].items() if number > CEILINGS[name]}
  assert not over, {name: report["found"].get(name, report["found"]["depth"]) for name in over}


def test_the_stacks_begin_at_the_call_and_end_in_attention(report):
  stacks = report["found"]["depth"]
  assert stacks["logits"][0] == "nn/transformer.py: Transformer.__call__"
  assert stacks["decode step"][0] == "nn/transformer.py: Transformer.step"
  assert stacks["train step"][0] == "train/step.py: make_step.<locals>.step"
  assert all(any(frame.startswith("ops/attention/") for frame in stack) for stack in stacks.values())


def package(folder: Path, **texts: str):
  for name, text in texts.items():
    (folder / f"{name}.py").write_text(text)
  return structure.modules(folder)


def test_parameters_are_counted_without_self_and_kernels_apart(tmp_path):
  trees = package(
    tmp_path,
    wide="class A:\n  def f(self, a, b, c, d, e, *, f): ...\n  def g(self, a, b, c, d, e, *f, **g): ...\n",
    kernels="def _kernel(a, b, c, d, e, f, g): ...\ndef my_kernel(a, b, c, d, e, f, g, /): ...\n",
  )
  ours, kernels = structure.long_signatures(trees)
  assert ours == ["wide.g (7)"]
  assert kernels == ["kernels._kernel (7)", "kernels.my_kernel (7)"]


def test_circles_count_imports_in_functions_and_not_those_of_type_checkers(tmp_path):
  trees = package(
    tmp_path,
    a="from sa_jax.b import x\n",
    b="def f():\n  import sa_jax.c\n",
    c="from sa_jax import a\n",
    d="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from sa_jax import e\n",
    e="from sa_jax import d\n",
  )
  graph = {name: set(structure.imports(name, tree, set(trees))) for name, tree in trees.items()}
  assert graph["d"] == set()
  assert structure.circles(graph) == [["a", "b", "c"]]


def test_layers_are_in_order():
  bottom_up = ["errors", "ops.norm", "config", "nn.block", "decode.engine", "cli.train"]
  heights = [structure.layer(module) for module in bottom_up]
  assert heights == sorted(set(heights))
  assert structure.layer("") == structure.layer("cli")


def test_any_is_counted_where_it_is_used(tmp_path):
  trees = package(tmp_path, a="import typing\nfrom typing import Any\nx: Any\ny: typing.Any = 'Any'\n", b="z = 1\n")
  assert structure.count_any(trees) == {"a": 2}
