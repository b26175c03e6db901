"""Damaged folders: each is refused, and leaves nothing behind."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sa_jax
from tests import tiny
from tests.formats.edits import edit_config, edit_tensors


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
    self.refuse(folder, "model.safetensors is not a complete safetensors file")

  @pytest.mark.parametrize("kept", [4, 100, 0.5, 0.99])
  def test_truncated_safetensors(self, folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    self.refuse(folder, "model.safetensors is not a complete safetensors file")

  @pytest.mark.parametrize("position", [0, 7, 8, 40])
  def test_corrupted_safetensors(self, folder, position):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[position : position + 4] = b"\xff\xff\xff\xff"
    (folder / "model.safetensors").write_bytes(content)
    self.refuse(folder, "model.safetensors is not a complete safetensors file")

  def test_integer_tensor(self, folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}))
    self.refuse(folder, "model.norm.weight in .* is I8; must be one of F64, F32, F16, BF16")

  def test_no_weights(self, folder):
    (folder / "model.safetensors").unlink()
    self.refuse(folder, "there is no model.safetensors and no model.safetensors.index.json")

  def test_no_config(self, folder):
    (folder / "config.json").unlink()
    self.refuse(folder, "there is no config.json")

  @pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable JSON"), ("", "not readable JSON"), ("[]", "must contain a JSON object")]
  )
  def test_damaged_config(self, folder, text, message):
    (folder / "config.json").write_text(text)
    self.refuse(folder, message)

  def test_unsupported_architecture(self, folder):
    edit_config(folder, model_type="novel")
    self.refuse(folder, "model_type 'novel' is not supported; supported are: .*llama, mistral")
    edit_config(folder, model_type="mamba")
    self.refuse(folder, "model_type 'mamba' is not supported: .* not attention layers")

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
    edit_config(folder, hidden_act="mish")
    self.refuse(folder, "hidden_act = 'mish': not implemented; must be 'swish' or 'silu' or")

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
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is not a complete safetensors file"):
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
