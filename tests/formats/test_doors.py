"""One model in every format, through every door: the same numbers, whichever it comes from."""

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

import sa_jax
from sa_jax.cli.cost import model_of
from sa_jax.formats.source import open_source
from tests import tiny
from tests.formats.test_gguf import SMALL, write_gguf
from tests.tiny import assert_trees_equal

KINDS = ("folder", "gguf", "checkpoint")
MODEL = tiny.model(**SMALL | {"num_layers": 3}, eos_token_ids=(2,))
PARAMS = tiny.params(MODEL)
PLAN = sa_jax.SharingPlan.parse("0:1", 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """The paths of one model's three forms, by kind."""
  top = tmp_path_factory.mktemp("doors")
  folder = tiny.write_hf(top / "folder", MODEL, PARAMS)
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.save(str(folder / "tokenizer.json"))
  sa_jax.convert(folder, top / "checkpoint", dtype=None)
  return {"folder": folder, "gguf": write_gguf(top / "m.gguf", MODEL, PARAMS), "checkpoint": top / "checkpoint"}


@pytest.mark.parametrize("kind", KINDS)
class TestDoors:
  def test_open(self, models, kind):
    model, params = sa_jax.from_pretrained(models[kind], layout="layers")
    assert model == MODEL
    assert_trees_equal(params, PARAMS)

  def test_source(self, models, kind):
    source = open_source(models[kind])
    account = sa_jax.inspect(models[kind], PLAN)
    paths = {entry.path: entry for entry in account.used}
    assert len(paths) + 2 == len(source.shapes) == len(source.dtypes)  # a follower's queries and keys are dropped
    assert set(account.dropped.values()) == {"layer 1 follows layer 0"}
    assert set(map(str.lower, source.dtypes.values())) <= {"float32", "f32"}
    whole = PARAMS["layers"]["2"]["attention"]["q_proj"]["kernel"]
    entry = paths["layers", "2", "attention", "q_proj", "kernel"]
    part = (slice(3, 9), slice(1, 3), slice(None))
    np.testing.assert_array_equal(source.parameter(entry, part), whole[part])
    np.testing.assert_array_equal(source.parameter(entry), whole)

  def test_convert(self, models, kind, tmp_path):
    sa_jax.convert(models[kind], tmp_path / "out", PLAN, "float32")
    model, params = sa_jax.from_pretrained(tmp_path / "out", layout="layers")
    assert model == sa_jax.Transformer(MODEL.config, PLAN)
    assert_trees_equal(params, sa_jax.prune(PARAMS, PLAN))

  @pytest.mark.parametrize("plan", [None, "0:1"])
  def test_export(self, models, kind, tmp_path, plan):
    sa_jax.export(models[kind], tmp_path / "out", plan=plan)
    before, after = tiny.tensors(MODEL, PARAMS), load_file(tmp_path / "out" / "model.safetensors")
    gone = [f"model.layers.1.self_attn.{name}_proj.weight" for name in ("q", "k") if plan]
    assert sorted(after) == sorted(set(before) - set(gone))
    for name, tensor in after.items():
      np.testing.assert_array_equal(tensor, before[name])

  def test_cost(self, models, kind):
    assert model_of(str(models[kind])) == (MODEL.config, sa_jax.SharingPlan.dense(3))

  def test_a_plan_that_needs_what_was_dropped(self, models, kind, tmp_path):
    (sa_jax.export if kind == "folder" else sa_jax.convert)(models[kind], tmp_path / "out", plan=PLAN)
    said = r"the plan 'dense' makes layers \[1\] anchors, but .*out has no queries and keys for them: .* plan '0:1'"
    with pytest.raises(sa_jax.UserError, match=said):
      sa_jax.from_pretrained(tmp_path / "out", "dense")


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_tokenizer(models, kind):
  assert sa_jax.load_tokenizer(models[kind]).encode("b a b") == [1, 0, 1]


def test_a_tokenizer_or_a_config_alone(models, tmp_path):
  """What is not asked for need not be there."""
  (tmp_path / "tokenizer.json").write_bytes((models["folder"] / "tokenizer.json").read_bytes())
  assert sa_jax.load_tokenizer(tmp_path).encode("b") == [1]
  (tmp_path / "config.json").write_bytes((models["folder"] / "config.json").read_bytes())
  assert model_of(str(tmp_path))[0] == MODEL.config


@pytest.mark.parametrize("door", [sa_jax.from_pretrained, sa_jax.inspect, sa_jax.load_tokenizer, model_of])
def test_a_missing_model_is_named_as_such(door, tmp_path):
  with pytest.raises(sa_jax.UserError, match=r"there is no file or folder .*absent"):
    door(str(tmp_path / "absent"))


def test_an_adapter_is_no_model(tmp_path):
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(sa_jax.UserError, match="is an adapter, not a model; merge it into its base model"):
    sa_jax.from_pretrained(tmp_path)
