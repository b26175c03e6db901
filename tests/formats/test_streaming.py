"""Placement: each device reads its own slice, nothing is held twice, any mesh opens what another wrote."""

from collections import Counter

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax.formats import lazy
from sa_jax.formats.opened import open_model
from sa_jax.formats.orbax_folder import OrbaxFolder
from sa_jax.sharding import make_mesh
from tests.formats import hf_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("streaming") / "phi3"
  hf_models.build("phi3", folder, num_key_value_heads=4)
  return folder


@pytest.mark.parametrize("layout", ["runs", "layers"])
def test_devices_hold_their_shards(folder, layout, monkeypatch):
  mesh = make_mesh(data=1, fsdp=2, tensor=4)
  reads = []
  read = lazy.LazyTensor.read

  def spy(self, layer=0, index=None):
    part = read(self, layer, index)
    reads.append((part.nbytes, int(np.prod(self.layer_shape)) * part.itemsize))
    return part

  monkeypatch.setattr(lazy.LazyTensor, "read", spy)
  _, params = sa_jax.from_pretrained(folder, "1:2-3", mesh=mesh, layout=layout)
  # What is read for a device is its slice: an eighth of a matrix that both axes divide, never all of it.
  matrices = [(part, whole) for part, whole in reads if whole > 8 * 32 * 4]
  assert matrices
  assert all(part * 8 == whole for part, whole in matrices)
  _, alone = sa_jax.from_pretrained(folder, "1:2-3", layout=layout)
  for sharded, whole in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
    np.testing.assert_array_equal(sharded, whole)
    for shard in sharded.addressable_shards:
      assert shard.data.shape == sharded.sharding.shard_shape(sharded.shape)
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}


def test_checkpoint_moves_between_meshes(folder, tmp_path):
  written = make_mesh(data=2, fsdp=2, tensor=2)
  model, params = sa_jax.from_pretrained(folder, mesh=written, layout="layers")
  from sa_jax.formats.checkpoint import save_checkpoint

  save_checkpoint(tmp_path / "ours", model.config, model.plan, params)
  sa_jax.convert(folder, tmp_path / "streamed", dtype=None)
  _, one = sa_jax.from_pretrained(folder, layout="layers")
  for path in (tmp_path / "ours", tmp_path / "streamed"):
    for mesh in (None, make_mesh(data=1, fsdp=8, tensor=1)):
      _, opened = sa_jax.from_pretrained(path, mesh=mesh, layout="layers")
      for found, expected in zip(jax.tree.leaves(opened), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_file_may_go_once_opened(folder, tmp_path):
  """Parameters do not live in the mapped file."""
  import shutil

  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  _, params = sa_jax.from_pretrained(copy, layout="layers")
  before = jax.tree.map(lambda leaf: np.array(leaf), params)
  for file in copy.glob("*.safetensors"):
    size = file.stat().st_size
    with file.open("r+b") as opened:
      opened.write(b"\xff" * size)
  for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(found, expected)


def test_dtype_never_passes_through_float32(folder, tmp_path, monkeypatch):
  hf_models.build("llama", tmp_path / "bf16", __import__("torch").bfloat16)
  kinds = set()
  read = lazy.LazyTensor.read
  monkeypatch.setattr(
    lazy.LazyTensor, "read", lambda self, *args: kinds.add(str((part := read(self, *args)).dtype)) or part
  )
  _, params = sa_jax.from_pretrained(tmp_path / "bf16")
  assert kinds == {"bfloat16"} == {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


def test_a_checkpoint_of_ours_is_read_as_it_is_written(folder, tmp_path, monkeypatch):
  """Pruned and in another dtype, one parameter at a time, as from_pretrained opens it; progress tells of each."""
  sa_jax.convert(folder, tmp_path / "dense", dtype="float32")
  read, told, seen = OrbaxFolder.read, [], []
  monkeypatch.setattr(OrbaxFolder, "read", lambda self, key, index=None: seen.append(key) or read(self, key, index))
  progress = lambda done, total: told.append((done, total))
  sa_jax.convert(tmp_path / "dense", tmp_path / "pruned", "1:2-3", "bfloat16", progress=progress)
  opened, expected = (
    sa_jax.from_pretrained(tmp_path / name, "1:2-3", "bfloat16", layout="layers", progress=progress)[1]
    for name in ("pruned", "dense")
  )
  count = len(jax.tree.leaves(expected))
  assert len(seen) == 3 * count  # each once by convert, and once by each opening
  assert set(Counter(seen).values()) == {3}
  assert not [key for key in seen if key.startswith(("layers/2/attention/q", "layers/3/attention/k"))]
  assert told == [(number + 1, count) for number in range(count)] * 3
  jax.tree.map(np.testing.assert_array_equal, opened, expected)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(opened)} == {"bfloat16"}


@pytest.mark.parametrize("ours", [False, True], ids=["safetensors", "orbax"])
def test_each_tensor_is_copied_once(folder, tmp_path, ours):
  """From the file to where JAX keeps it, whatever the file: in memory of its own, which JAX takes over."""
  if ours:
    sa_jax.convert(folder, tmp_path / "ours", dtype=None)
  source = open_model(tmp_path / "ours" if ours else folder)
  for leaf in jax.tree.leaves(source.tree()):
    part = leaf.read_owned(0, None)
    if part.flags.c_contiguous:
      assert part.ctypes.data % 64 == 0
      assert jax.device_put(part, may_alias=True).unsafe_buffer_pointer() == part.ctypes.data
