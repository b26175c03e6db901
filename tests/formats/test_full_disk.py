"""Where no file may grow: one line from each writer, and nothing left."""

import contextlib
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

import sa_jax
from sa_jax.cli import main

MODEL = Path(__file__).parents[1] / "data" / "reference" / "llama-gqa-8l"


@contextlib.contextmanager
def full(most: int):
  """Inside, a file can have this many bytes: what is written after them is refused as by a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A folder, and a checkpoint of the same."""
  folder = tmp_path_factory.mktemp("models")
  for name in ("config.json", "model.safetensors"):
    (folder / "hf").mkdir(exist_ok=True)
    shutil.copy(MODEL / name, folder / "hf")
  sa_jax.convert(folder / "hf", folder / "checkpoint")
  return folder


@pytest.mark.parametrize(
  ("command", "most"),
  [
    (["convert", "hf", "OUT"], 20_000),
    (["export", "checkpoint", "OUT"], 20_000),
    (["export", "checkpoint", "OUT"], 100),
    (["cost", "checkpoint", "--json", "OUT"], 100),
  ],
)
def test_commands(models, tmp_path, capsys, command, most):
  out = tmp_path / "out"
  arguments = [
    str(models / word) if word in ("hf", "checkpoint") else word.replace("OUT", str(out)) for word in command
  ]
  with full(most):
    code = main(arguments)
  error = capsys.readouterr().err
  assert (code, error) == (2, f"sa-jax: error: cannot write {out}: File too large\n")
  assert not list(tmp_path.iterdir())
  assert main(arguments) == 0


def test_pictures(tmp_path):
  plots = pytest.importorskip("sa_jax.analysis.plots")
  pytest.importorskip("matplotlib")
  path = tmp_path / "a.png"
  with full(1000), pytest.raises(sa_jax.UserError, match=r"^cannot write .*a\.png: File too large$"):
    plots.similarity_map(np.eye(4), path, title="a")
  assert not list(tmp_path.iterdir())
