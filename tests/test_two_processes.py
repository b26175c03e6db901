"""Two processes of four devices are one of eight: equal numbers, equal files, and faults that both of them tell."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import sa_jax
from tests import host_devices, pods, tiny

# lm-eval's own warnings, where it is installed.
pytestmark = [
  pytest.mark.slow,
  *map(pytest.mark.filterwarnings, ("ignore::DeprecationWarning", "ignore::ResourceWarning")),
]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What one process finds, what each of two finds, and the folders that they wrote."""
  top = tmp_path_factory.mktemp("pods")
  tiny.write_hf(top / "model", pods.model(), tiny.params(pods.model()))
  pods.write_tasks(top)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  strict = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
  env = os.environ | host_devices(4) | strict
  both = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.pods", str(top), str(port), "2", str(rank)],
      cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for rank in range(2)
  ]  # fmt: skip
  one = pods.work(top, top / "one", {"slice": 2, "fsdp": 2, "tensor": 2})
  told = [each.communicate(timeout=600)[0] for each in both]
  assert [each.returncode for each in both] == [0, 0], told
  return top, one, [json.loads((top / f"found-{rank}.json").read_text()) for rank in range(2)]


def test_numbers(found):
  _, one, two = found
  for each in two:
    for name in ("plan", "tokens", "batched"):
      assert each[name] == one[name]
    for name in ("loss", "scores", "cosine", "shared", "aligned"):
      np.testing.assert_allclose(each[name], one[name], rtol=1e-5, atol=1e-6)
  assert {name: two[0][name] for name in one} == {name: two[1][name] for name in one}
  assert two[0]["rows"] == two[1]["rows"] == [[0] * 3, [1] * 3, [1] * 3]


def test_three_tasks_of_lm_eval(found):
  _, one, two = found
  if "metrics" not in one:
    pytest.skip("lm-eval is not installed: pip install 'sa-jax[eval]'")
  assert len({name.split()[0] for name in one["metrics"]}) == 3
  for each in two:
    assert each["generated"] == one["generated"]
    assert each["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


def test_files(found):
  top, _, _ = found
  assert {path.name for path in (top / "one").iterdir()} == {path.name for path in (top / "two").iterdir()}
  for name, exact in (("converted", True), ("exported", True), ("shared", False)):
    one, two = (sa_jax.from_pretrained(top / each / name) for each in ("one", "two"))
    assert one[0] == two[0]
    if exact:
      tiny.assert_trees_equal(one[1], two[1])
    else:
      for a, b in zip(*(jax.tree.leaves(tree) for tree in (one[1], two[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  records = [json.loads((top / each / "record.json").read_text()) for each in ("one", "two")]
  assert records[0]["plans"].keys() == records[1]["plans"].keys()


def test_faults_are_told_by_every_process(found):
  """Each in one line that names the processes, with their checksums where two have different things."""
  _, _, (first, second) = found
  tokens, files, conversion, configs, texts, left_out, *calls = first["faults"]
  different = {0: ("tokens for perplexity", tokens), 3: ("configs", configs), 4: (r"text\.txt", texts)}
  named = (
    "max_new_tokens for generate",
    "requests for a step of the batcher",
    "batch_tokens for scores",
    "requests for scores",
    "chunk for refit",
    "plan for align",
    "wanted for share",
    "plan for Judge.walk",
    "layout for from_pretrained",
  )
  different |= dict(enumerate(zip(named, calls, strict=True), start=6))
  for place, (what, said) in different.items():
    match = re.fullmatch(
      rf"processes have different {what}: (.{{1,8}}) on process 0 \(.+\); (.{{1,8}}) on process 1 \(.+\); give all .*",
      said,
    )
    assert match
    assert match[1] != match[2]
    assert second["faults"][place] == said
  assert re.search(r"the files of the model cannot be read on every process: process 1: .*nowhere", files)
  assert "nowhere" in second["faults"][1]
  assert "nowhere" in conversion
  assert second["faults"][2] == f"process 0: {conversion}"
  assert "process 1 did not reach a step that process 1 leaves out within 1 s of process 0" in left_out
