"""GGUF files of every architecture, against the Hugging Face folder of the same weights."""

import re

import gguf
import numpy as np
import pytest

import sa_jax
from sa_jax.formats.gguf_architectures import ARCHITECTURES
from sa_jax.formats.gguf_file import GgufFile
from sa_jax.formats.load import describe
from tests.formats import hf_models
from tests.formats.gguf_files import (
  ABOUT_ONE,
  ATTENTION,
  CASES,
  MLP,
  NORMS,
  OUTER,
  assert_same_model,
  build,
  by_kind,
  convert,
  metadata,
  swap,
)


@pytest.mark.parametrize("architecture", CASES)
def test_the_model_of_the_folder(architecture, tmp_path):
  folder = build(architecture, tmp_path)
  convert(folder, tmp_path / "model.gguf", architecture)
  # Norms with one added have lost their last bits.
  assert_same_model(tmp_path / "model.gguf", folder, 1e-6 if architecture.startswith(ABOUT_ONE) else 0.0)


def test_every_architecture_has_a_test():
  assert ARCHITECTURES.keys() == {case.split()[0] for case in CASES} | hf_models.PUBLISHED.keys()


INTERNLM2 = {
  "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate",
  "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
}  # fmt: skip
SCALED = {"embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 4.0, "rope.scaling.original_context_length": 8}


@pytest.mark.parametrize("family", hf_models.PUBLISHED)
def test_the_published_models(family, tmp_path):
  """Packed rows come apart, and those of queries and keys are swapped."""
  theirs = hf_models.Published(family, tmp_path / "hf")
  model, params = sa_jax.from_pretrained(tmp_path / "hf")
  config = model.config
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", family)
  more = SCALED | {"rope.scaling.attn_factor": config.rope.magnitude} if family == "minicpm" else {}
  metadata(writer, config, more)
  if family == "minicpm":
    for name in ("short", "long"):
      factors = np.array(theirs.config["rope_scaling"][f"{name}_factor"], np.float32)
      writer.add_tensor(f"rope_factors_{name}.weight", factors)
  names = INTERNLM2 if family == "internlm2" else NORMS | ATTENTION | MLP
  outer = OUTER | {"model.tok_embeddings": "token_embd", "output": "output"}
  for key, tensor in theirs.weights.items():
    name, kind = key.rsplit(".", 1)
    parts = {outer.get(name): tensor.numpy()}
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
      parts = {names.get(match[2]): tensor.numpy()}
      if match[2] == "self_attn.W_pack":
        parts = dict(zip(("attn_q", "attn_k", "attn_v"), np.split(tensor.numpy(), 3), strict=True))
      if match[2] == "attention.wqkv":
        cuts = [config.num_heads * config.head_dim, (config.num_heads + config.num_kv_heads) * config.head_dim]
        packed = np.split(by_kind(tensor.numpy(), config), cuts)
        parts = dict(zip(("attn_q", "attn_k", "attn_v"), packed, strict=True))
    for part, array in parts.items():
      heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part)
      array = array if heads is None else swap(array, heads)
      writer.add_tensor(f"blk.{match[1]}.{part}.{kind}" if match else f"{part}.{kind}", array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  tokens = np.random.default_rng(0).integers(2, 90, (2, 24)).astype(np.int32)
  opened, found = sa_jax.from_pretrained(tmp_path / "model.gguf")
  got, wanted = (each.apply({"params": own}, tokens) for each, own in ((opened, found), (model, params)))
  np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_parts(tmp_path):
  folder = build("qwen3", tmp_path)
  convert(folder, tmp_path / "model.gguf", "qwen3", parts=3)
  paths = sorted(tmp_path.glob("*.gguf"))
  assert len(paths) >= 3
  assert_same_model(paths[0], folder)
  with pytest.raises(ValueError, match=f"one of {len(paths)} parts; open the first, {paths[0].name}"):
    GgufFile(paths[1])
  paths[-1].rename(tmp_path / "away")
  with pytest.raises(ValueError, match=f"parts are missing .*{paths[-1].name}"):
    GgufFile(paths[0])
  paths[0].with_name(paths[1].name).rename(paths[-1])
  paths[1].write_bytes(paths[-1].read_bytes())
  with pytest.raises(ValueError, match=r"says that it is part \[1, "):
    GgufFile(paths[0])


@pytest.mark.parametrize(
  ("values", "rope"),
  [
    ({"type": "yarn", "factor": 4.0, "original_context_length": 16}, {"attention_factor": None}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 16.0}, {"beta_fast": 16.0}),
    (
      {"type": "yarn", "factor": 4.0, "original_context_length": 16, "attn_factor": 0.5},
      {"attention_factor": 0.5 * (0.1 * np.log(4) + 1)},
    ),
  ],
)
def test_yarn(values, rope, tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
  metadata(writer, sa_jax.ModelConfig.preset("smollm2-135m"), {f"rope.scaling.{key}": values[key] for key in values})
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  found = sa_jax.ModelConfig.from_hf(GgufFile(tmp_path / "model.gguf").config | {"vocab_size": 8}).rope
  assert (found.scaling, found.factor, found.original_max_length) == ("yarn", 4.0, 16)
  for name, value in rope.items():
    assert getattr(found, name) == (value if value is None else pytest.approx(value))


def test_longrope_and_a_part_of_each_head(tmp_path):
  """Phi-4-mini."""
  short, long = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
  rope = {"type": "longrope", "short_factor": short, "long_factor": long}
  changes = dict(
    hidden_size=64, sliding_window=None, original_max_position_embeddings=16,
    rope_parameters=rope | {"partial_rotary_factor": 0.75, "rope_theta": 1e4},
  )  # fmt: skip
  hf_models.build("phi3", tmp_path / "hf", **changes)
  model = describe(tmp_path / "hf")
  assert (model.config.rope.factor, model.config.rope.fraction) == (4.0, 0.75)
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "phi3")
  metadata(writer, model.config, {})
  writer.add_rope_dimension_count(12)
  writer.add_rope_scaling_orig_ctx_len(16)
  writer.add_sliding_window(0)
  writer.add_rope_scaling_attn_factors(model.config.rope.magnitude)
  writer.add_tensor("rope_factors_short.weight", np.array(short, np.float32))
  writer.add_tensor("rope_factors_long.weight", np.array(long, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  found = sa_jax.ModelConfig.from_hf(GgufFile(tmp_path / "model.gguf").config | {"vocab_size": 96})
  assert found.rope.magnitude == pytest.approx(model.config.rope.magnitude, rel=1e-6)
  assert (found.rope.short_factors, found.rope.long_factors) == (tuple(short), tuple(long))
  assert (found.rope.fraction, found.head_dim, found.window) == (0.75, 16, None)


QUANTISED = [kind for kind in gguf.GGMLQuantizationType if kind.name not in ("F64", "I8", "I16", "I32", "I64")]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantises(kind, tmp_path):
  size, length = gguf.GGML_QUANT_SIZES[kind]
  data = np.random.default_rng(0).integers(0, 256, (192, 512 // size * length), np.uint8)
  stored = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8)
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
  metadata(writer, sa_jax.ModelConfig.preset("smollm2-135m"), {})
  writer.add_tensor("blk.0.attn_v.weight", data.view(stored), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with np.errstate(all="ignore"):
    try:
      expected = gguf.quants.dequantize(data.view(stored), kind)
    except NotImplementedError:
      with pytest.raises(ValueError, match=f"blk.0.attn_v.weight .* is {kind.name}, which the gguf package cannot"):
        GgufFile(tmp_path / "model.gguf")
      return
    np.testing.assert_array_equal(
      GgufFile(tmp_path / "model.gguf").read("model.layers.0.self_attn.v_proj.weight"), expected
    )
