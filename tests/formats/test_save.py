"""What is saved comes back as it was: the model, its numbers, their layout and type; what does not fit is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import sa_jax
from sa_jax.sharding import make_mesh, param_shardings
from tests import tiny
from tests.tiny import assert_trees_equal

MODEL = tiny.model("0:1", num_layers=3, embed_dim=32, vocab_size=64)


@pytest.mark.parametrize("layout", ["layers", "runs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_is_the_mirror_of_save(tmp_path, layout, dtype):
  config = dataclasses.replace(
    MODEL.config, dtype="bfloat16", param_dtype=dtype, cache_dtype="int8", attention="blockwise",
    attention_state="attention_weights", remat="dots",
  )  # fmt: skip
  plan = MODEL.plan.with_head_maps({1: [1, 0, 3, 2]})
  model = sa_jax.Transformer(config, plan)
  params = tiny.params(model, layout)
  sa_jax.save(tmp_path / "saved", model, params)
  back, found = sa_jax.load(tmp_path / "saved")
  assert back == model
  assert_trees_equal(found, params)
  opened, layers = sa_jax.from_pretrained(tmp_path / "saved", layout="layers")
  assert (opened.plan, opened.config.architecture) == (plan, config.architecture)
  assert_trees_equal(layers, params if layout == "layers" else sa_jax.unstack(params, plan))


def test_from_a_mesh_onto_a_mesh(tmp_path):
  params = tiny.params(MODEL, "runs")
  spread = jax.device_put(params, param_shardings(MODEL, make_mesh(data=2, fsdp=2, tensor=2)))
  sa_jax.save(tmp_path / "saved", MODEL, spread)
  mesh = make_mesh(data=1, fsdp=4, tensor=2)
  back, found = sa_jax.load(tmp_path / "saved", mesh)
  assert back == MODEL
  assert_trees_equal(found, params)
  same = lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, found, param_shardings(MODEL, mesh))))


def test_what_was_initialised_with_its_axes(tmp_path):
  tokens = np.ones((1, 3), np.int32)
  boxed = MODEL.init(jax.random.key(0), tokens)["params"]
  sa_jax.save(tmp_path / "saved", MODEL, boxed)
  back, found = sa_jax.load(tmp_path / "saved")
  np.testing.assert_array_equal(back.apply({"params": found}, tokens), MODEL.apply({"params": boxed}, tokens))


def test_parameters_of_another_type_than_the_config_says(tmp_path):
  half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), tiny.params(MODEL))
  sa_jax.save(tmp_path / "saved", MODEL, half)
  back, found = sa_jax.load(tmp_path / "saved")
  assert (back.config.param_dtype, back.config.dtype) == ("float16", "float32")
  assert_trees_equal(found, half)


def test_tokenizer(tmp_path):
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
  made = sa_jax.Tokenizer(backend, "{{ messages }}", (("bos_token", "a"),))
  sa_jax.save(tmp_path / "saved", MODEL, tiny.params(MODEL), made)
  back = sa_jax.load_tokenizer(tmp_path / "saved")
  assert (back.encode("b"), back.chat_template, back.special) == ([1], made.chat_template, made.special)


def test_of_another_model_load_is_from_pretrained(tmp_path):
  params = tiny.params(tiny.model("dense", num_layers=3))
  back, found = sa_jax.load(tiny.write_hf(tmp_path / "hf", tiny.model("dense", num_layers=3), params))
  assert_trees_equal(found, sa_jax.stack(params, back.plan))


def test_refused(tmp_path):
  params = tiny.params(MODEL)
  wrong = params | {"final_norm": {"scale": np.ones(3, np.float32)}, "spare": np.ones(2, np.float32)}
  del wrong["layers"]["2"]["mlp"]["up_proj"]
  with pytest.raises(sa_jax.UserError, match="the parameters in the layout 'layers' do not match the model") as caught:
    sa_jax.save(tmp_path / "saved", MODEL, wrong)
  assert str(caught.value).split("\n  ")[1:] == [
    "missing: layers/2/mlp/up_proj/kernel [32, 48]",
    "unknown: spare [2]",
    "wrong shape: final_norm/scale is [3], the config says [32]",
  ]
  mixed = tiny.params(MODEL)
  mixed["final_norm"]["scale"] = mixed["final_norm"]["scale"].astype(np.float16)
  with pytest.raises(sa_jax.UserError, match=r"all must have one dtype, not .*float16 \(final_norm/scale\)"):
    sa_jax.save(tmp_path / "saved", MODEL, mixed)
  assert not (tmp_path / "saved").exists()
  sa_jax.save(tmp_path / "saved", MODEL, tiny.params(MODEL))
  with pytest.raises(sa_jax.UserError, match="saved exists already"):
    sa_jax.save(tmp_path / "saved", MODEL, tiny.params(MODEL))
  speed, layout = {"layout": "runs", "compute": {"speed": 9}}, {"layout": "x", "compute": {}}
  for values, said in ((speed, "'compute' with fields of"), (layout, "unknown layout 'x'")):
    (tmp_path / "saved" / "sa_jax.json").write_text(json.dumps(values))
    with pytest.raises(sa_jax.UserError, match=said):
      sa_jax.load(tmp_path / "saved")
