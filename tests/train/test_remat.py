"""What a run's backward pass recomputes: the fastest that fits by what is compiled, told, recorded and kept."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import UserError
from sa_jax.mesh import MeshSizes
from sa_jax.train import remat
from sa_jax.train.folder import checked
from sa_jax.train.loop import train
from sa_jax.train.remat import device_memory, fastest, step_bytes
from tests.train.tiny_run import config

GB = 10**9
NEEDED = {"dots": 120, "attention": 98, "full": 90}


class Step:
  """A step that takes so many gigabytes, or that the compiler refuses."""

  def __init__(self, gigabytes: int | None) -> None:
    self._gigabytes = gigabytes

  def lower(self, *arguments: object) -> "Step":
    return self

  def compile(self) -> "Step":
    if self._gigabytes is None:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: it does not fit")
    return self

  def memory_analysis(self) -> SimpleNamespace:
    kept = self._gigabytes * GB // 2
    return SimpleNamespace(
      argument_size_in_bytes=kept, output_size_in_bytes=kept, alias_size_in_bytes=kept, temp_size_in_bytes=kept
    )


def chosen(monkeypatch, memory, needed=NEEDED):
  monkeypatch.setattr(remat, "device_memory", lambda mesh: memory and int(memory * GB))
  compiled = []

  def make(policy):
    compiled.append(policy)
    return Step(needed.get(policy, 150))

  return str(fastest(make, (), None)), compiled


@pytest.mark.parametrize(
  ("memory", "told"),
  [
    (141, "dots (of 141 GB: 120 GB needed)"),
    (110, "attention (of 110 GB: 98 GB needed; dots would need 120 GB)"),
    (101, "full (of 101 GB: 90 GB needed; dots would need 120 GB; attention would need 98 GB)"),
    (80, "full (of 80 GB: 90 GB needed, so it may not fit; dots would need 120 GB; attention would need 98 GB)"),
    (None, "none (these devices do not report their memory)"),
  ],
)
def test_the_fastest_that_fits(monkeypatch, memory, told):
  found, compiled = chosen(monkeypatch, memory)
  assert found == told
  assert compiled == ["none"] or compiled == list(NEEDED)[: len(compiled)]


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
  found, _ = chosen(monkeypatch, 100, NEEDED | {"dots": None, "attention": 95})
  assert found == "attention (of 100 GB: 95 GB needed; dots would need more than there is)"
  found, _ = chosen(monkeypatch, 80, NEEDED | {"full": None})
  assert found.startswith("attention (of 80 GB: 98 GB needed, so it may not fit")
  with pytest.raises(UserError, match=r"a step does not fit in the 100 GB that JAX may use on a device"):
    chosen(monkeypatch, 100, dict.fromkeys(NEEDED))


def test_where_none_fits_the_one_that_needs_least_is_tried(monkeypatch):
  """Of a small step the slowest is not always it."""
  found, compiled = chosen(monkeypatch, 80, NEEDED | {"full": 100})
  assert found.startswith("attention (of 80 GB: 98 GB needed, so it may not fit; ")
  assert found.endswith("dots would need 120 GB; full would need 100 GB)")
  assert compiled == list(NEEDED)


def test_an_array_that_is_given_twice_is_there_once(monkeypatch):
  """As the base of adapters and their teacher are."""
  one, two = jnp.zeros(GB // 4000, jnp.float32), jnp.zeros(10, jnp.float32)
  assert remat._twice(({"base": one, "teacher": one}, two)) == one.nbytes


def test_other_processes_have_their_say(monkeypatch):
  monkeypatch.setattr(remat, "exchange", lambda what, mine, seconds: [mine, str(100 * GB)])
  assert chosen(monkeypatch, 101)[0].startswith("full (of 101 GB: 100 GB needed, so it may not fit")


def test_bytes_are_what_a_program_holds():
  """Two arguments of a megabyte, one of them given away for the result."""
  compiled = jax.jit(lambda a, b: a + b, donate_argnums=0).lower(*[jnp.zeros(2**18, jnp.float32)] * 2).compile()
  assert 2 * 2**20 <= step_bytes(compiled) <= 2 * 2**20 + 1024


@pytest.mark.parametrize(("limits", "answers", "memory"), [
  ([5, 7], ["5", "3"], 3), ([5, 7], ["5", "0"], None), ([None, 7], ["0"], None)
])  # fmt: skip
def test_the_smallest_device_of_all_processes_decides(monkeypatch, limits, answers, memory):
  device = lambda limit: SimpleNamespace(memory_stats=lambda: None if limit is None else {"bytes_limit": limit})

  def exchange(what, mine, seconds):
    assert mine == str(min(limit or 0 for limit in limits))
    return answers

  monkeypatch.setattr(remat, "exchange", exchange)
  assert device_memory(SimpleNamespace(local_devices=[device(limit) for limit in limits])) == memory


@pytest.mark.slow
def test_a_run_keeps_what_it_began_with(tmp_path, monkeypatch):
  """Chosen by its own compiled step, which is then what runs; kept on other devices too, unless asked for another."""
  made, said = config(tmp_path / "run", steps=2, mesh=MeshSizes(fsdp=2)), []
  monkeypatch.setattr(remat, "device_memory", lambda mesh: GB)
  whole = train(dataclasses.replace(made, out=tmp_path / "whole", remat="dots"))
  assert train(made, say=said.append).step == 2
  assert any(" dots (of 1 GB: 0.00" in text for text in said)
  recorded = lambda: json.loads((made.out / "config.json").read_text())["remat"]
  assert recorded() == "dots"
  losses = [
    [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    for folder in (made.out, tmp_path / "whole")
  ]
  np.testing.assert_array_equal(*losses)
  assert whole.step == 2
  monkeypatch.setattr(remat, "device_memory", lambda mesh: None)
  assert checked(made).remat == "dots"
  assert checked(dataclasses.replace(made, remat="full")).remat == "full"
