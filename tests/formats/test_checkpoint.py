"""Checkpoints of ours: written, read again, under other plans and on meshes, damaged."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import sa_jax
from sa_jax import SharingPlan, stack
from sa_jax.files import new_folder
from sa_jax.formats import checkpoint
from sa_jax.formats.orbax_folder import OrbaxFolder
from sa_jax.sharding import make_mesh
from tests.formats.edits import edit_config
from tests.tiny import assert_trees_equal


class TestCheckpoint:
  def test_round_trip(self, converted, model, params):
    opened, found = sa_jax.from_pretrained(converted, layout="layers")
    assert opened == model
    assert_trees_equal(found, params)
    opened, found = sa_jax.from_pretrained(converted)
    assert_trees_equal(found, stack(params, model.plan))

  @pytest.mark.parametrize("layout", ["runs", "layers"])
  def test_under_another_plan(self, converted, params, layout):
    plan = SharingPlan.parse("0:1-2", 3)
    opened, found = sa_jax.from_pretrained(converted, plan, "bfloat16", layout=layout)
    assert opened.plan == plan
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), sa_jax.prune(params, plan))
    assert_trees_equal(found, wanted if layout == "layers" else stack(wanted, plan))

  def test_pruned_and_pruned_further(self, tmp_path, pristine, params):
    sa_jax.convert(pristine, tmp_path / "once", "0:1", None)
    opened, _ = sa_jax.from_pretrained(tmp_path / "once")
    assert opened.plan == SharingPlan.parse("0:1", 3)
    sa_jax.convert(tmp_path / "once", tmp_path / "twice", "0:1-2")
    opened, found = sa_jax.from_pretrained(tmp_path / "twice", layout="layers")
    assert opened.config.param_dtype == "bfloat16"
    wanted = sa_jax.prune(params, SharingPlan.parse("0:1-2", 3))
    assert_trees_equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted))
    with pytest.raises(
      ValueError, match="makes layers \\[2\\] anchors, but .* was made for the plan '0:1-2'; start from"
    ):
      sa_jax.from_pretrained(tmp_path / "twice", "0:1")

  def test_stored_head_maps_stay_with_their_pairs(self, tmp_path, pristine):
    heads = sa_jax.from_pretrained(pristine)[0].config.num_heads
    reverse, first = tuple(range(heads))[::-1], (0,) * heads
    stored = SharingPlan.parse("0:1-2", 3).with_head_maps({1: reverse, 2: first})
    dst = tmp_path / "mapped"
    sa_jax.convert(pristine, dst, SharingPlan.parse("0:1", 3).with_head_maps({1: reverse}), None)
    # By a string, whose layer 1 follows 0 as stored and whose layer 2 has no stored map.
    for plan in ("0:1-2", [0, 0, 0]):
      assert sa_jax.from_pretrained(dst, plan)[0].plan == SharingPlan.parse("0:1-2", 3).with_head_maps({1: reverse})
    # By a plan: exactly that one.
    for plan in (SharingPlan.parse("0:1-2", 3), stored):
      assert sa_jax.from_pretrained(dst, plan)[0].plan == plan

  def test_pruned_is_smaller_on_disk(self, tmp_path, pristine, params):
    """Followers' queries and keys are not stored at all."""
    plan = SharingPlan.parse("0:1-2", 3)
    sa_jax.convert(pristine, tmp_path / "pruned", plan, None)
    stored = OrbaxFolder(tmp_path / "pruned")
    wanted = jax.tree_util.tree_leaves_with_path(sa_jax.prune(params, plan))
    wanted = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in wanted}
    assert stored.shapes == {name: leaf.shape for name, leaf in wanted.items()}
    assert stored.dtypes == {name: str(leaf.dtype) for name, leaf in wanted.items()}

  def test_orbax_reads_what_we_write_and_we_what_it_writes(self, tmp_path, converted, params):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
      assert_trees_equal(checkpointer.restore(converted / "params"), params)
      theirs = tmp_path / "theirs"
      theirs.mkdir()
      shutil.copy(converted / "config.json", theirs)
      mesh = make_mesh(data=1, fsdp=4, tensor=2)
      spread = sa_jax.from_pretrained(converted, mesh=mesh, layout="layers")[1]
      checkpointer.save(theirs / "params", spread)  # in a chunk a device, compressed
    assert_trees_equal(sa_jax.from_pretrained(theirs, layout="layers")[1], params)

  @pytest.mark.parametrize("layout", ["runs", "layers"])
  def test_on_a_mesh(self, converted, pristine, params, layout):
    """fsdp 2 × tensor 2, twice: each device holds its part, whichever file it came from."""
    plan = SharingPlan.parse("0:1", 3)
    wanted = sa_jax.prune(params, plan)
    wanted = wanted if layout == "layers" else stack(wanted, plan)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for path in (pristine, converted):
      _, found = sa_jax.from_pretrained(path, plan, mesh=mesh, layout=layout)
      assert_trees_equal(found, wanted)
      # fsdp 2 splits embed, which every matrix has, and tensor 2 what it has beside that; vectors are whole.
      held = dict.fromkeys(jax.devices(), 0)
      expected = 0
      for path_of, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert len(leaf.sharding.device_set) == 8
        expected += leaf.nbytes // (1 if path_of[-1].key == "scale" else 4)
        for shard in leaf.addressable_shards:
          held[shard.device] += shard.data.nbytes
      assert set(held.values()) == {expected}

  def test_existing_folder(self, tmp_path, pristine):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already; name a new folder, or remove it first"):
      sa_jax.convert(pristine, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []

  def test_folder_that_cannot_be_made(self, tmp_path, pristine):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*file is not a folder"):
      sa_jax.convert(pristine, tmp_path / "file" / "out")

  def test_failure_while_writing_leaves_nothing(self, tmp_path, model, params, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*_args, **_kwargs):
      raise RuntimeError("disk full")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(RuntimeError, match="disk full"):
      checkpoint.save_checkpoint(tmp_path / "out", model.config, model.plan, params)
    assert list(tmp_path.iterdir()) == []

  def test_unfinished_folder_is_not_the_checkpoint(self, tmp_path):
    with new_folder(tmp_path / "out") as folder:
      assert folder.parent == tmp_path
      assert folder.name.startswith(".out.unfinished")
      assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

  def test_damaged(self, tmp_path, converted):
    def damaged(name: str) -> Path:
      return Path(shutil.copytree(converted, tmp_path / name))

    without = damaged("without")
    shutil.rmtree(without / "params")
    (without / "params").mkdir()
    with pytest.raises(ValueError, match="params is not a whole checkpoint: it holds no parameters"):
      sa_jax.from_pretrained(without)
    import tensorstore as ts

    part = damaged("part")
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{part / 'params'}/"}).result()
    store.delete_range(ts.KvStore.KeyRange("final_norm.scale/0", "final_norm.scale/1")).result()
    with pytest.raises(ValueError, match="params is not a whole checkpoint: parts of final_norm.scale are missing"):
      sa_jax.from_pretrained(part)
    config = damaged("config")
    (config / "config.json").unlink()
    with pytest.raises(ValueError, match="there is no config.json"):
      sa_jax.from_pretrained(config)
    other = damaged("other")
    edit_config(other, intermediate_size=40, num_hidden_layers=4, shared_attention={"source": [0, 1, 2, 3]})
    with pytest.raises(ValueError, match="does not hold the model that its config describes") as caught:
      sa_jax.from_pretrained(other)
    assert "wrong shape: layers/0/mlp/up_proj/kernel is [32, 48], the config says [32, 40]" in str(caught.value)
    assert "missing: layers/3/attention/q_proj/kernel [32, 4, 8]" in str(caught.value)
    fewer = damaged("fewer")
    edit_config(fewer, num_hidden_layers=2, shared_attention={"source": [0, 1]})
    with pytest.raises(ValueError, match="unknown: layers/2/attention/q_proj/kernel \\[32, 4, 8\\]"):
      sa_jax.from_pretrained(fewer)

  def test_emptied_data_files(self, tmp_path, converted):
    """In a process of its own, whose end waits for the threads that Orbax leaves behind on failure."""
    broken = Path(shutil.copytree(converted, tmp_path / "broken"))
    data = [file for file in (broken / "params").rglob("*") if file.is_file() and file.parent.name == "d"]
    assert data
    for file in data:
      file.write_bytes(b"")
    program = (
      "import sys, sa_jax\n"
      "try: sa_jax.from_pretrained(sys.argv[1])\n"
      "except ValueError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(broken)], capture_output=True, text=True, check=True)
    assert re.match(r"refused: .*params (is not a whole checkpoint|cannot be read)", done.stdout)
