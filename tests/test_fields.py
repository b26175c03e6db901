"""What fields of dataclasses may hold."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from sa_jax import ModelConfig, UserError
from sa_jax.analysis.budget import Budget
from sa_jax.analysis.distilling import Distillation
from sa_jax.analysis.reconstruct import Reconstruction
from sa_jax.analysis.refit import Refit
from sa_jax.analysis.share import Effort, Search
from sa_jax.bench.task import Task
from sa_jax.decode import Beams, Settings, TextSettings
from sa_jax.evaluation.settings import Asking, Limits
from sa_jax.fields import Count, Natural, Portion, Positive, Seed, check_fields, misfits
from sa_jax.files import as_path
from sa_jax.fit import Job
from sa_jax.mesh import MeshSizes
from sa_jax.ops import RopeConfig
from sa_jax.plan import SharingPlan
from sa_jax.train import DataConfig, DistillConfig, LogConfig, LoraConfig, OptimizerConfig, Reading, TrainConfig


@dataclasses.dataclass
class Inner:
  on: bool = True


@dataclasses.dataclass
class Outer:
  kind: Literal["a", "b"] | None = "a"
  one: Literal["a", "b", 3] = 3
  count: Annotated[int, "many"] = 3
  rate: Positive | None = 0.5
  name: str | None = None
  path: Path | None = None
  paths: tuple[Path, ...] = ()
  pair: tuple[Count, Natural] | None = None
  inner: Inner = dataclasses.field(default_factory=Inner)
  call: Callable[[int], int] | None = None


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ({}, []),
    ({"kind": None, "name": "x", "inner": Inner(False)}, []),
    ({"kind": "c"}, ["kind='c' (must be a or b or None)"]),
    ({"one": True}, ["one=True (must be one of a, b, 3)"]),
    ({"count": "3"}, ["count='3' (must be an integer)"]),
    ({"count": True}, ["count=True (must be an integer)"]),
    ({"count": 2.0, "name": 4}, ["count=2.0 (must be an integer)", "name=4 (must be a string or None)"]),
    ({"rate": "1"}, ["rate='1' (must be a number or None)"]),
    ({"rate": 0}, ["rate=0 (must be a positive number)"]),
    ({"rate": math.inf}, ["rate=inf (must be a finite number)"]),
    ({"rate": math.nan}, ["rate=nan (must be a finite number)"]),
    ({"rate": 10**400}, [f"rate=1{'0' * 78}… (must be a finite number)"]),
    ({"path": 1}, ["path=1 (must be a path or None)"]),
    ({"paths": "x"}, ["paths='x' (must be a tuple)"]),
    ({"paths": (1,)}, ["paths=(1,) (must be a tuple in which each entry is a path)"]),
    ({"pair": 3}, ["pair=3 (must be a tuple of 2 or None)"]),
    ({"pair": (1,)}, ["pair=(1,) (must be a tuple of 2)"]),
    ({"pair": (1, -1)}, ["pair=(1, -1) (must be a tuple in which each entry is 0 or more)"]),
    ({"inner": None}, ["inner=None (must be an Inner)"]),
    ({"inner": {}}, ["inner={} (must be an Inner)"]),
  ],
)
def test_misfits(values, said):
  assert misfits(Outer(**values)) == said


@dataclasses.dataclass(frozen=True)
class Numbers:
  seed: Seed = 0
  part: Portion = 0.5

  def __post_init__(self):
    check_fields(self, "numbers")


@pytest.mark.parametrize("values", [{"seed": -1}, {"seed": 2**32}, {"part": -0.1}, {"part": 1.1}])
def test_ranges(values):
  with pytest.raises(UserError, match=r"numbers: \w+=\S+ \(must be 0 to \d+\)"):
    Numbers(**values)
  assert Numbers(2**32 - 1, 1) == Numbers(2**32 - 1, 1.0)


def test_values_of_other_forms_are_brought_into_the_fields_own():
  found = Outer(count=np.int64(4), rate=2, name=Path("a/b"), path="c", paths=["d", Path("e")], pair=np.array([1, 2]))
  assert misfits(found) == []
  wanted = Outer(count=4, rate=2.0, name="a/b", path=Path("c"), paths=(Path("d"), Path("e")), pair=(1, 2))
  assert found == wanted
  assert [type(each) for each in (found.count, found.rate, found.pair[0])] == [int, float, int]
  bucket = Outer(path="gs://bucket/x")
  misfits(bucket)
  assert bucket.path == as_path("gs://bucket/x")


RUN = {"out": Path("run"), "preset": "smollm2-135m"}
TINY = ModelConfig(16, 8, 2, 2, 1, 4, 16)
JOB = {
  "config": TINY, "plan": SharingPlan.dense(2), "kind": "train", "topology": "v5e:2x2", "batch": 4, "length": 8,
}  # fmt: skip


@pytest.mark.parametrize(
  ("kind", "changes"),
  [
    (TrainConfig, RUN | {"mode": "foo"}),
    (TrainConfig, RUN | {"method": "qlora"}),
    (TrainConfig, RUN | {"steps": "3"}),
    (TrainConfig, RUN | {"out": None}),
    (TrainConfig, RUN | {"optimizer": None}),
    (TrainConfig, RUN | {"mesh": "data=1"}),
    (TrainConfig, RUN | {"shape": {}}),
    (TrainConfig, RUN | {"seed": -1}),
    (TrainConfig, RUN | {"seed": 2**70}),
    (TrainConfig, RUN | {"gradual_steps": -1}),
    (TrainConfig, RUN | {"z_loss": math.nan}),
    (TrainConfig, RUN | {"date": "31 May"}),
    (DataConfig, {"packing": "tight"}),
    (DataConfig, {"reading": None}),
    (DataConfig, {"train": "text.txt"}),
    (DataConfig, {"length": 1}),
    (DistillConfig, {"temperature": 0}),
    (DistillConfig, {"teacher_weight": 1.5}),
    (DistillConfig, {"hidden_weight": -1}),
    (LogConfig, {"minutes": 0}),
    (LogConfig, {"peak_tflops": -1}),
    (LogConfig, {"profile": (1,)}),
    (LogConfig, {"profile": (5, 3)}),
    (Reading, {"cache": 3}),
    (OptimizerConfig, {"learning_rate": "1e-3"}),
    (OptimizerConfig, {"clip_norm": math.inf}),
    (LoraConfig, {"alpha": 0}),
    (LoraConfig, {"targets": "q_proj"}),
    (MeshSizes, {"fsdp": "2"}),
    (Search, {"strategy": "guess"}),
    (Search, {"excluded": 3}),
    (Effort, {"calibration_rows": 0}),
    (Effort, {"local_epochs": -1}),
    (Effort, {"search": "dp"}),
    (Refit, {"ridge": None}),
    (Reconstruction, {"epochs": 1.5}),
    (Distillation, {"dtype": "int8"}),
    (Budget, {"measure": "kv", "amount": "80%"}),
    (Task, {"kind": "sleep", "model": "tiny"}),
    (Task, {"kind": "decode", "model": "tiny", "who": "me"}),
    (Task, {"kind": "decode", "model": "tiny", "layers": 0}),
    (
      Job,
      {"config": TINY, "plan": SharingPlan.dense(2), "kind": "eat", "topology": "v5e:2x2", "batch": 4, "length": 8},
    ),
    (Asking, {"limit": 0}),
    (Limits, {"slots": "4"}),
    (Beams, {"length_penalty": "1"}),
    (TextSettings, {"stops": ("",)}),
    (Settings, {"sampler": 0.7}),
    (RopeConfig, {"theta": "10000"}),
    (ModelConfig, dataclasses.asdict(TINY) | {"rope": None, "local_layers": ("0",)}),
    (ModelConfig, dataclasses.asdict(TINY) | {"rope": None, "qkv_bias": "no"}),
  ],
)
def test_what_is_built_in_python_is_checked(kind, changes):
  """With one line for each fault, that names the field."""
  with pytest.raises(UserError, match=rf"^\w+( \w+)?: ({'|'.join(changes)})=.* \(must be .*\)$") as caught:
    kind(**changes)
  assert "\n" not in str(caught.value)


def test_a_run_takes_texts_for_paths():
  data = DataConfig(train=["a.txt"], eval=("b.txt",), reading=Reading(cache="c"))
  run = TrainConfig("run", preset="smollm2-135m", data=data, tokenizer=Path("folder"))
  assert run == TrainConfig(
    Path("run"),
    preset="smollm2-135m",
    data=DataConfig((Path("a.txt"),), eval=(Path("b.txt"),), reading=Reading(cache=Path("c"))),
    tokenizer="folder",
  )
