"""Compiling for TPUs ahead of time: what it shows of dense and plan, and what it refuses."""

import dataclasses
import importlib.util

import pytest

from sa_jax import ModelConfig, SharingPlan, cost
from sa_jax.cli import main
from sa_jax.fit import Job, compile_job, fit
from sa_jax.mesh import MeshSizes

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'sa-jax[tpu]'"
)

SMALL = ModelConfig(
  vocab_size=512, embed_dim=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=512,
  dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip


def job(plan, kind, **changes):
  sizes = {"topology": "v5e:2x2", "batch": 4, "length": 256, "mesh": MeshSizes(fsdp=2, tensor=2)}
  return Job(SMALL, SharingPlan.parse(plan, 4), kind, **(sizes | changes))


@needs_libtpu
@pytest.mark.parametrize("kind", ["train", "decode"])
def test_sharing_adds_no_collective_and_takes_no_more_memory(kind):
  dense, shared = compile_job(job("dense", kind)), compile_job(job("0:1-3", kind))
  assert dense.fits
  assert shared.fits
  assert shared.peak_bytes < dense.peak_bytes
  assert shared.argument_bytes < dense.argument_bytes
  assert (dense.device, dense.devices) == ("TPU v5 lite", 4)
  old, new = ({found.kind: found for found in result.collectives} for result in (dense, shared))
  assert set(new) <= set(old)
  assert all(new[kind].count <= old[kind].count and new[kind].bytes <= old[kind].bytes for kind in new)
  # What is saved: the query and key projections of three followers are not gathered over fsdp, forward or recomputed.
  projections = 3 * SMALL.embed_dim * (SMALL.num_heads + SMALL.num_kv_heads) * SMALL.head_dim // 2 * 2
  times = 2 if kind == "train" else 1
  # libtpu 0.0.50, but not 0.0.42, gathers the anchor's, and its norm, once more to make the state of the backward pass.
  again = projections // 3 + SMALL.embed_dim * 2 if kind == "train" else 0
  saved = old["all-gather"].bytes - new["all-gather"].bytes
  assert times * projections - again <= saved <= times * projections


@needs_libtpu
def test_roofline_is_counted_and_arguments_are_what_a_device_holds():
  found = compile_job(job("0:1-3", "decode"))
  counted = cost(SMALL, "0:1-3", 4, 256)
  assert found.compute_seconds == pytest.approx(counted.decode_flops / 4 / 197e12)
  # Parameters are read whole over fsdp, split over tensor; the cache is split over both.
  read = (counted.decode_bytes - counted.kv_cache_bytes) / 2 + counted.kv_cache_bytes / 4
  assert found.memory_seconds == pytest.approx(read / 820e9)
  assert found.roofline_seconds == found.memory_seconds
  held = (counted.param_bytes + counted.kv_cache_bytes) / 4
  assert held <= found.argument_bytes <= 1.05 * held


@needs_libtpu
@pytest.mark.parametrize("kind", ["loop", "perplexity", "scoring", "calibration"])
def test_what_public_functions_compile(kind):
  """A device holds its part of the parameters, and of rows; scoring holds the head apart, a refit a layer at a time."""
  small = dataclasses.replace(SMALL, num_layers=2)
  found = compile_job(dataclasses.replace(job("0:1-3", kind), config=small, plan=SharingPlan.parse("0:1", 2)))
  counted = cost(small, "0:1", 4, 256)
  assert found.fits
  if kind == "loop":
    held = (counted.param_bytes + counted.kv_cache_bytes) / 4
    assert held <= found.argument_bytes <= 1.1 * held
  head = small.vocab_size * small.embed_dim * 2
  layer = (counted.param_bytes - 2 * head) / 2
  held = {"scoring": counted.param_bytes - head, "calibration": layer}.get(kind, counted.param_bytes)
  assert found.argument_bytes > held / 4
  assert found.peak_bytes >= found.argument_bytes
  assert {each.kind for each in found.collectives} & {"all-gather", "all-reduce"}
  heads = 4 * 4 * 256 * small.embed_dim * small.vocab_size  # the dense and the shared model's, which a refit leaves out
  flops = {"loop": counted.decode_flops, "calibration": counted.flops + cost(small, None, 4, 256).flops - heads}
  assert found.compute_seconds == pytest.approx(flops.get(kind, counted.flops) / 4 / 197e12)


@needs_libtpu
def test_too_big_is_an_answer():
  big = dataclasses.replace(SMALL, num_layers=1, vocab_size=2_000_000, embed_dim=8192)
  found = fit(dataclasses.replace(job("dense", "decode"), config=big, plan=SharingPlan.dense(1)))
  assert not found.fits
  assert found.peak_bytes is None
  assert "exceeds available HBM (15.75G)" in found.problem
  assert "\n" not in found.problem


@needs_libtpu
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"topology": "v99:2x2"}, "^libtpu does not know the topology 'v99:2x2'.*examples: v5e:2x4"),
    (
      {"mesh": MeshSizes(fsdp=4, tensor=2)},
      "v5e:2x2: a mesh of data 1 × fsdp 4 × tensor 2 needs 8 devices; there are 4",
    ),
  ],
)
def test_what_cannot_be_is_said(changes, message):
  with pytest.raises(ValueError, match=message):
    compile_job(job("dense", "decode", **changes))


def test_sizes_are_checked_before_anything_is_compiled():
  with pytest.raises(ValueError, match=r"batch=3 \(must be a multiple of data × fsdp = 2\)\n  a plan for 3 layers"):
    Job(SMALL, SharingPlan.dense(3), "train", "v5e:2x2", batch=3, length=8, mesh=MeshSizes(1, fsdp=2))
  with pytest.raises(ValueError, match=r"length=99999999999 \(must be less than 2,147,483,648.*\)"):
    job("dense", "train", length=99_999_999_999)
  with pytest.raises(ValueError, match=r"length=0 \(must be at least 1\)"):
    job("dense", "train", length=0)
  with pytest.raises(ValueError, match="calibration needs followers"):
    job("dense", "calibration")
  with pytest.raises(ValueError, match=r"length=1 \(must be at least 2 for a loop.*\)"):
    job("dense", "loop", length=1)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch, capsys):
  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest))
  assert main(["fit", "llama-2-7b", "--topology", "v5e:2x2", "--mesh", "fsdp=2"]) == 2
  error = capsys.readouterr().err.strip()
  assert error.count("\n") == 0
  assert "pip install 'sa-jax[tpu]'" in error
