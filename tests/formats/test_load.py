"""Opening checkpoints: right weights, every key accounted for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sa_jax
from sa_jax import SharingPlan, machine, stack
from sa_jax.formats import lazy
from tests import tiny
from tests.formats.edits import SMALL, edit_config, edit_tensors
from tests.tiny import assert_trees_equal


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
    assert said.startswith("NaN or infinite numbers in ")
    assert set(said.split(" in ")[1].split(", ")) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}

  def test_what_the_dtype_cannot_hold(self, folder, caplog):
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e6))
    sa_jax.from_pretrained(folder, dtype="bfloat16")
    assert caplog.records == []
    with np.errstate(over="ignore"):
      sa_jax.from_pretrained(folder, dtype="float16")
    assert [record.getMessage() for record in caplog.records] == ["NaN or infinite numbers in model.norm.weight"]

  @pytest.mark.parametrize("layout", ["runs", "layers"])
  def test_no_two_checks_are_in_flight(self, pristine, layout, monkeypatch):
    """On a mesh a check is a collective, and jaxlib 0.10's CPU backend deadlocks on more than 32 unawaited ones."""
    waiting = []

    class Check:
      def __init__(self, array):
        assert not waiting
        waiting.append(array)

      def __bool__(self):
        return bool(jnp.isfinite(waiting.pop()).all())

    monkeypatch.setattr(lazy, "_is_finite", Check)
    sa_jax.from_pretrained(pristine, layout=layout)
    assert not waiting

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


class TestArguments:
  def test_refused(self, pristine, tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder .*nowhere"):
      sa_jax.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model.safetensors is not a GGUF file; a model is a Hugging Face folder"):
      sa_jax.from_pretrained(pristine / "model.safetensors")
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; use float32, bfloat16, float16"):
      sa_jax.from_pretrained(pristine, dtype="int8")
    with pytest.raises(ValueError, match="unknown layout 'flat'; choose 'runs' or 'layers'"):
      sa_jax.from_pretrained(pristine, layout="flat")
    with pytest.raises(ValueError, match="goes past the model, whose layers are 0 to 2"):
      sa_jax.from_pretrained(pristine, "2:3")
    with pytest.raises(ValueError, match="the plan is for 4 layers, the model has 3"):
      sa_jax.from_pretrained(pristine, SharingPlan.dense(4))


def test_a_tensor_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
  """Here a machine of three kilobytes: the embedding has 61 × 32 numbers of two bytes or more."""
  model = tiny.model("dense")
  path = tiny.write_hf(tmp_path / "model", model, tiny.params(model))
  monkeypatch.setattr(lazy, "_put", pytest.fail)
  monkeypatch.setattr(machine, "memory", lambda: 3000)
  with pytest.raises(ValueError, match=r"model.embed_tokens.weight \(61, 32\) takes at least .* GB, but this machine"):
    sa_jax.from_pretrained(path)
