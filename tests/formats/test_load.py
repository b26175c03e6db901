"""Opening and writing checkpoints: right weights, every key accounted for, damage refused, nothing left behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sa_jax
from sa_jax import SharingPlan, stack
from sa_jax.files import new_folder
from sa_jax.formats import checkpoint
from sa_jax.formats.orbax_folder import OrbaxFolder
from sa_jax.sharding import make_mesh
from tests import tiny
from tests.tiny import assert_trees_equal

SMALL = {"plan": "dense", "num_layers": 3, "vocab_size": 64}


@pytest.fixture(scope="module")
def model():
  return tiny.model(**SMALL)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, model, params) -> Path:
  """A Hugging Face folder that tests read and do not change."""
  return tiny.write_hf(tmp_path_factory.mktemp("hf") / "model", model, params)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, pristine) -> Path:
  """The same model, dense, as an sa_jax checkpoint that tests read and do not change."""
  folder = tmp_path_factory.mktemp("sa") / "model"
  sa_jax.convert(pristine, folder, dtype=None)
  return folder


@pytest.fixture
def folder(tmp_path, pristine) -> Path:
  """A copy to damage."""
  return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit_tensors(folder: Path, change) -> None:
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **values) -> None:
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


class TestHfFolder:
  @pytest.mark.parametrize("spelling", ["v4", "v5"])
  @pytest.mark.parametrize("shards", [1, 3])
  @pytest.mark.parametrize("tied", [False, True])
  def test_layers(self, tmp_path, spelling, shards, tied):
    model = tiny.model(**SMALL, tie_embeddings=tied)
    params = tiny.params(model)
    path = tiny.write_hf(tmp_path / "model", model, params, shards, spelling)
    opened, found = sa_jax.from_pretrained(str(path), layout="layers")
    assert opened == model
    assert_trees_equal(found, params)

  def test_runs_is_the_default(self, pristine, model, params):
    _, found = sa_jax.from_pretrained(pristine)
    assert_trees_equal(found, stack(params, model.plan))

  @pytest.mark.parametrize("layout", ["runs", "layers"])
  def test_plan(self, pristine, params, layout):
    plan = SharingPlan.parse("0:1", 3)
    wanted = sa_jax.prune(params, plan)
    for form in (plan, "0:1", [0, 0, 2]):
      opened, found = sa_jax.from_pretrained(pristine, form, layout=layout)
      assert opened.plan == plan
      assert_trees_equal(found, wanted if layout == "layers" else stack(wanted, plan))

  def test_plan_in_the_config(self, folder):
    edit_config(folder, shared_attention={"source": [0, 1, 1]})
    assert sa_jax.from_pretrained(folder)[0].plan == SharingPlan.parse("1:2", 3)
    assert sa_jax.from_pretrained(folder, "dense")[0].plan == SharingPlan.dense(3)

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  def test_dtype(self, pristine, params, dtype):
    opened, found = sa_jax.from_pretrained(pristine, dtype=dtype, layout="layers")
    assert opened.config.dtype == opened.config.param_dtype == dtype
    assert_trees_equal(found, jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params))

  def test_stored_in_bfloat16(self, folder, params):
    edit_config(folder, dtype="bfloat16")
    edit_tensors(folder, lambda tensors: tensors.update({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}))
    opened, found = sa_jax.from_pretrained(folder, layout="layers")
    assert opened.config.param_dtype == "bfloat16"
    assert_trees_equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))

  def test_generation_config_names_further_end_tokens(self, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert sa_jax.from_pretrained(folder)[0].config.eos_token_ids == (5, 7)

  def test_progress(self, pristine, params):
    seen = []
    sa_jax.from_pretrained(pristine, layout="layers", progress=lambda *step: seen.append(step))
    count = len(jax.tree.leaves(params))
    assert seen == [(n + 1, count) for n in range(count)]


class TestNumbersThatAreNotFinite:
  @pytest.mark.parametrize("layout", ["runs", "layers"])
  @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
  def test_are_named_by_their_tensors(self, folder, caplog, layout, wrong):
    def change(tensors):
      tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = wrong
      tensors["model.norm.weight"][-1] = wrong

    edit_tensors(folder, change)
    sa_jax.from_pretrained(folder, layout=layout)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("there are NaN or infinite numbers in ")
    assert set(said.split(" in ")[1].split(", ")) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}

  def test_what_the_dtype_cannot_hold(self, folder, caplog):
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e6))
    sa_jax.from_pretrained(folder, dtype="bfloat16")
    assert caplog.records == []
    with np.errstate(over="ignore"):
      sa_jax.from_pretrained(folder, dtype="float16")
    assert [record.getMessage() for record in caplog.records] == [
      "there are NaN or infinite numbers in model.norm.weight"
    ]

  def test_many_are_not_all_listed(self, folder, caplog):
    edit_tensors(folder, lambda tensors: [tensor.fill(np.nan) for tensor in tensors.values()])
    sa_jax.from_pretrained(folder)
    (record,) = caplog.records
    count = len(load_file(folder / "model.safetensors"))
    assert record.getMessage().endswith(f" and {count - 5} more")


class TestAccount:
  def test_dropped(self, folder):
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}))
    account = sa_jax.inspect(folder, "0:1")
    assert account.dropped == {
      "model.layers.1.self_attn.q_proj.weight": "layer 1 follows layer 0",
      "model.layers.1.self_attn.k_proj.weight": "layer 1 follows layer 0",
      "lm_head.weight": "the output head is tied to the embedding",
      "model.layers.0.self_attn.rotary_emb.inv_freq": "recomputed from rope_theta",
    }
    stored = set(load_file(folder / "model.safetensors"))
    assert {entry.key for entry in account.used} == stored - set(account.dropped)

  def test_followers_need_no_queries_and_keys_in_the_file(self, folder, params):
    edit_tensors(folder, lambda t: [t.pop(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qk"])
    _, found = sa_jax.from_pretrained(folder, "0:1", layout="layers")
    assert_trees_equal(found, sa_jax.prune(params, SharingPlan.parse("0:1", 3)))
    with pytest.raises(ValueError, match="missing: model.layers.1.self_attn.q_proj.weight"):
      sa_jax.from_pretrained(folder)

  def test_every_mismatch_at_once(self, folder):
    def change(tensors):
      del tensors["model.norm.weight"]
      del tensors["model.layers.2.mlp.up_proj.weight"]
      tensors["model.layers.0.self_attn.v_proj.weight"] = np.zeros((32, 16), np.float32)
      tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((3, 3), np.float32)
      tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
      tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)

    edit_tensors(folder, change)
    for plan in (None, "0:1"):  # A tensor that would be dropped is checked too.
      with pytest.raises(ValueError, match="does not hold the model that its config describes") as caught:
        sa_jax.from_pretrained(folder, plan)
      assert set(str(caught.value).split("\n  ")[1:]) == {
        "missing: model.norm.weight [32]",
        "missing: model.layers.2.mlp.up_proj.weight [48, 32]",
        "wrong shape: model.layers.0.self_attn.v_proj.weight is [32, 16], the config says [16, 32]",
        "wrong shape: model.layers.1.self_attn.q_proj.weight is [3, 3], the config says [32, 32]",
        "unknown: model.layers.3.mlp.up_proj.weight [48, 32]",
        "unknown: model.layers.0.self_attn.q_proj.bias [32]",
      }


class TestDamagedFolder:
  """Each is refused, and a conversion of it leaves nothing behind."""

  def refuse(self, folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
      sa_jax.from_pretrained(folder)
    before = set(folder.parent.iterdir())
    with pytest.raises(ValueError, match=message):
      sa_jax.convert(folder, folder.parent / "out")
    assert set(folder.parent.iterdir()) == before

  def test_empty_safetensors(self, folder):
    (folder / "model.safetensors").write_bytes(b"")
    self.refuse(folder, "model.safetensors is not a whole safetensors file")

  @pytest.mark.parametrize("kept", [4, 100, 0.5, 0.99])
  def test_truncated_safetensors(self, folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    self.refuse(folder, "model.safetensors is not a whole safetensors file")

  @pytest.mark.parametrize("position", [0, 7, 8, 40])
  def test_corrupted_safetensors(self, folder, position):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[position : position + 4] = b"\xff\xff\xff\xff"
    (folder / "model.safetensors").write_bytes(content)
    self.refuse(folder, "model.safetensors is not a whole safetensors file")

  def test_integer_tensor(self, folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}))
    self.refuse(folder, "model.norm.weight in .* is I8; one of F64, F32, F16, BF16 is needed")

  def test_no_weights(self, folder):
    (folder / "model.safetensors").unlink()
    self.refuse(folder, "there is no model.safetensors and no model.safetensors.index.json")

  def test_no_config(self, folder):
    (folder / "config.json").unlink()
    self.refuse(folder, "there is no config.json")

  @pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable JSON"), ("", "not readable JSON"), ("[]", "must hold a JSON object")]
  )
  def test_damaged_config(self, folder, text, message):
    (folder / "config.json").write_text(text)
    self.refuse(folder, message)

  def test_unsupported_architecture(self, folder):
    edit_config(folder, model_type="novel")
    self.refuse(folder, "model_type 'novel' is not supported; supported are: .*llama, mistral")
    edit_config(folder, model_type="mamba")
    self.refuse(folder, "model_type 'mamba' is not supported: .* another kind than attention")

  def test_unknown_key_where_that_is_asked_for(self, folder):
    edit_config(folder, novel=1)
    sa_jax.from_pretrained(folder)
    for call in (
      lambda: sa_jax.from_pretrained(folder, strict=True),
      lambda: sa_jax.convert(folder, folder.parent / "out", strict=True),
      lambda: sa_jax.inspect(folder, strict=True),
    ):
      with pytest.raises(ValueError, match="novel = 1: this key is not known"):
        call()
    assert not (folder.parent / "out").exists()

  def test_value_that_is_not_implemented(self, folder):
    edit_config(folder, hidden_act="gelu")
    self.refuse(folder, "hidden_act = 'gelu': not implemented; 'silu' or 'gelu_pytorch_tanh' is")

  @pytest.mark.parametrize(
    ("shared", "message"),
    [
      ({"source": [0, 0]}, "the plan is for 2 layers, the model has 3"),
      ({"source": [1, 1, 1]}, "layer 0 cannot be a follower"),
      ({"source": "0:1"}, "shared_attention must be"),
      ({"source": [0, 1, 2], "heads": 1}, "shared_attention has unknown keys \\['heads'\\]"),
    ],
  )
  def test_bad_plan_in_the_config(self, folder, shared, message):
    edit_config(folder, shared_attention=shared)
    self.refuse(folder, message)

  def test_not_a_number(self, folder):
    """A weight file of the right form whose index names another depth."""
    edit_config(folder, num_hidden_layers=2)
    self.refuse(folder, "unknown: model.layers.2.input_layernorm.weight")


class TestDamagedShards:
  @pytest.fixture
  def sharded(self, tmp_path, model, params) -> Path:
    return tiny.write_hf(tmp_path / "model", model, params, shards=3)

  def edit_index(self, folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))

  def test_missing(self, sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="shards are missing from .*: model-00002-of-00003.safetensors"):
      sa_jax.from_pretrained(sharded)

  def test_truncated(self, sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is not a whole safetensors file"):
      sa_jax.from_pretrained(sharded)

  @pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin"])
  def test_index_that_points_elsewhere(self, sharded, name):
    save_file({"model.norm.weight": np.ones(32, np.float32)}, sharded.parent / "other.safetensors")
    self.edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(ValueError, match=f"not safetensors files of its folder: .*{re.escape(name)}"):
      sa_jax.from_pretrained(sharded)

  def test_index_that_names_the_wrong_shard(self, sharded):
    def change(weight_map):
      weight_map["lm_head.weight"] = next(n for n in weight_map.values() if n != weight_map["lm_head.weight"])

    self.edit_index(sharded, change)
    with pytest.raises(ValueError, match="tensors that are not in the file it gives for them: \\['lm_head.weight'\\]"):
      sa_jax.from_pretrained(sharded)

  def test_index_without_a_map(self, sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'weight_map'"):
      sa_jax.from_pretrained(sharded)

  def test_tensor_in_two_shards(self, sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    tensors = load_file(shards[1])
    key, value = next(iter(load_file(shards[0]).items()))
    save_file(tensors | {key: value}, shards[1])
    with pytest.raises(ValueError, match=f"{re.escape(key)} is in both {shards[0].name} and {shards[1].name}"):
      sa_jax.from_pretrained(sharded)


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
      # fsdp 2 splits embed, which every parameter has; tensor 2 splits what every matrix has beside it.
      held = dict.fromkeys(jax.devices(), 0)
      expected = 0
      for path_of, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert len(leaf.sharding.device_set) == 8
        expected += leaf.nbytes // (2 if path_of[-1].key == "scale" else 4)
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


class TestArguments:
  def test_refused(self, pristine, tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder .*nowhere"):
      sa_jax.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model.safetensors is not a GGUF file; a model is a Hugging Face folder"):
      sa_jax.from_pretrained(pristine / "model.safetensors")
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; one of float32, bfloat16, float16 is"):
      sa_jax.from_pretrained(pristine, dtype="int8")
    with pytest.raises(ValueError, match="there is no layout 'flat'; there are 'runs' and 'layers'"):
      sa_jax.from_pretrained(pristine, layout="flat")
    with pytest.raises(ValueError, match="goes past the model, whose layers are 0 to 2"):
      sa_jax.from_pretrained(pristine, "2:3")
    with pytest.raises(ValueError, match="the plan is for 4 layers, the model has 3"):
      sa_jax.from_pretrained(pristine, SharingPlan.dense(4))
