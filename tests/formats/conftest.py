"""A small Llama, as a folder of Hugging Face's and as a checkpoint of ours."""

import shutil
from pathlib import Path

import pytest

import sa_jax
from tests import tiny
from tests.formats.edits import SMALL


@pytest.fixture(scope="session")
def model():
  return tiny.model(**SMALL)


@pytest.fixture(scope="session")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, model, params) -> Path:
  """A Hugging Face folder that tests read and do not change."""
  return tiny.write_hf(tmp_path_factory.mktemp("hf") / "model", model, params)


@pytest.fixture(scope="session")
def converted(tmp_path_factory, pristine) -> Path:
  """The same model, dense, as an sa_jax checkpoint that tests read and do not change."""
  folder = tmp_path_factory.mktemp("sa") / "model"
  sa_jax.convert(pristine, folder, dtype=None)
  return folder


@pytest.fixture
def folder(tmp_path, pristine) -> Path:
  """A copy to damage."""
  return Path(shutil.copytree(pristine, tmp_path / "model"))
