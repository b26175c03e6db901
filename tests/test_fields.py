"""What fields of dataclasses may hold."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest

from sa_jax import UserError
from sa_jax.fields import misfits
from sa_jax.train.config import DataConfig, TrainConfig


@dataclasses.dataclass
class Inner:
  rate: float = 1.0
  on: bool = True


@dataclasses.dataclass
class Outer:
  kind: Literal["a", "b"] | None = "a"
  count: Annotated[int, "many"] = 3
  name: str | None = None
  path: Path | None = None
  inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize(
  ("values", "said"),
  [
    (Outer(), []),
    (Outer(kind=None, name="x", inner=Inner(rate=2)), []),
    (Outer(path="x"), []),  # not looked at
    (Outer(kind="c"), ["kind='c' (a or b or None is needed)"]),
    (Outer(count="3"), ["count='3' (an integer is needed)"]),
    (Outer(count=True), ["count=True (an integer is needed)"]),
    (Outer(count=2.0, name=4), ["count=2.0 (an integer is needed)", "name=4 (a text or None is needed)"]),
    (Outer(inner=Inner("1", 0)), ["rate='1' (a number is needed)", "on=0 (True or False is needed)"]),
  ],
)
def test_misfits(values, said):
  assert misfits(values) == said


@pytest.mark.parametrize(
  "changes",
  [{"mode": "foo"}, {"method": "qlora"}, {"remat": "some"}, {"steps": "3"}, {"data": DataConfig(packing="tight")}],
)
def test_a_run_takes_what_its_flags_take(changes):
  with pytest.raises(UserError, match=r"training: .* is needed"):
    TrainConfig(out=Path("run"), preset="smollm2-135m", **changes)
