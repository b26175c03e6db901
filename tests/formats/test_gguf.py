"""GGUF files, written by the gguf package, against the Hugging Face folder of the same weights."""

import functools
from pathlib import Path

import gguf
import numpy as np
import pytest

import sa_jax
from sa_jax import SharingPlan
from sa_jax.formats.gguf_reader import QuickReader
from sa_jax.ops import RopeConfig
from tests import tiny
from tests.formats.gguf_files import ATTENTION, MLP, NORMS, sizes, swap
from tests.tiny import assert_trees_equal

# Sizes that the blocks of 32 values of quantised types divide.
SMALL = {"plan": "dense", "num_layers": 2, "vocab_size": 64, "mlp_dim": 64, "norm_eps": 1e-5, "bos_token_id": 1}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | NORMS | ATTENTION | MLP
QUANTISED = gguf.GGMLQuantizationType


def write_gguf(path: Path, model, params, kind=QUANTISED.F32, change=None) -> Path:
  """The model as llama.cpp's converter writes it: matrices in one type, norms in float32."""
  config = model.config
  writer = gguf.GGUFWriter(path, "llama")
  sizes(writer, config)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope.theta)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_bos_token_id(config.bos_token_id)
  writer.add_eos_token_id(config.eos_token_ids[0])
  for key, weight in tiny.tensors(model, params).items():
    name = key.removesuffix(".weight")
    if name.startswith("model.layers."):
      _, _, layer, rest = name.split(".", 3)
      name = f"blk.{layer}.{NAMES[rest]}"
    else:
      name = NAMES[name]
    for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
      if name.endswith(f"attn_{letter}"):
        weight = swap(weight, heads)
    if weight.ndim == 1 or kind == QUANTISED.F32:
      writer.add_tensor(f"{name}.weight", weight)
    else:
      writer.add_tensor(f"{name}.weight", quantise(weight, kind), raw_dtype=kind)
  if change is not None:
    change(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def quantise(weight: np.ndarray, kind) -> np.ndarray:
  return gguf.quants.quantize(weight, kind)


@functools.cache
def small(tied: bool = False):
  model = tiny.model(**SMALL, tie_embeddings=tied, eos_token_ids=(2,))
  return model, tiny.params(model)


@pytest.mark.parametrize("tied", [False, True])
def test_float32_is_exact(tmp_path, tied):
  model, params = small(tied)
  path = write_gguf(tmp_path / "model.gguf", model, params)
  opened, found = sa_jax.from_pretrained(path, layout="layers")
  assert opened == model
  assert_trees_equal(found, params)
  folder = tiny.write_hf(tmp_path / "hf", model, params)
  assert_trees_equal(found, sa_jax.from_pretrained(folder, layout="layers")[1])


def rope_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
  """What llama.cpp's converter writes for Llama 3.1, a frequency at a time."""
  out = []
  for plane in range(head_dim // 2):
    wavelength = 2 * np.pi * theta ** (2 * plane / head_dim)
    smooth = min(max((8192 / wavelength - 1) / 3, 0), 1)
    out.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(out, np.float32)


def test_llama_3_1_s_rotary_frequencies(tmp_path):
  rope = RopeConfig(500_000.0, "llama3", 32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)
  model = tiny.model(**SMALL | {"head_dim": 64, "rope": rope}, eos_token_ids=(2,))
  params, factors = tiny.params(model), rope_factors(64, 500_000.0, 32.0)
  assert 1 < sum(1 < each < 32 for each in factors) < 30
  path = write_gguf(tmp_path / "model.gguf", model, params, change=lambda w: w.add_tensor("rope_freqs.weight", factors))
  opened, found = sa_jax.from_pretrained(path, layout="layers")
  assert opened == model
  assert_trees_equal(found, params)
  other = lambda writer: writer.add_tensor("rope_freqs.weight", factors**0.9)
  with pytest.raises(ValueError, match="rope_freqs.weight are not Llama 3's factors"):
    sa_jax.from_pretrained(write_gguf(tmp_path / "other.gguf", model, params, change=other))


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(tmp_path, key):
  """llama.cpp's default type."""
  path = write_gguf(tmp_path / "model.gguf", *small(), change=lambda writer: writer.add_float32(key, 4.0))
  rope = sa_jax.from_pretrained(path)[0].config.rope
  assert (rope.scaling, rope.factor) == ("linear", 4.0)


def test_the_token_that_ends_a_turn_ends_generation(tmp_path):
  model, params = small()
  path = write_gguf(tmp_path / "model.gguf", model, params, change=lambda writer: writer.add_eot_token_id(5))
  assert sa_jax.from_pretrained(path)[0].config.eos_token_ids == (*model.config.eos_token_ids, 5)


# Relative to the largest value of a block: rounding; half of one of 127 steps; half of one of 15 steps between its
# ends. The steps' sizes are rounded to float16.
@pytest.mark.parametrize(
  ("kind", "error"), [(QUANTISED.F16, 2**-11), (QUANTISED.Q8_0, 0.5 / 127 + 2**-10), (QUANTISED.Q4_1, 1.02 / 15)]
)
def test_quantised(tmp_path, kind, error):
  model, params = small()
  path = write_gguf(tmp_path / "model.gguf", model, params, kind)
  opened, found = sa_jax.from_pretrained(path, layout="layers")
  assert opened.config.param_dtype == "float32"
  ours, theirs = tiny.tensors(model, found), tiny.tensors(model, params)
  for key, wanted in theirs.items():
    if wanted.ndim == 1:
      np.testing.assert_array_equal(ours[key], wanted)
      continue
    blocks = np.abs(wanted).reshape(-1, 32).max(axis=1, keepdims=True)
    difference = np.abs(ours[key] - wanted).reshape(-1, 32)
    assert (difference <= error * blocks).all()
    assert difference.max() > 0


def test_file_is_smaller(tmp_path):
  """The quantised file is what it says it is."""
  model, params = small()
  sizes = [
    write_gguf(tmp_path / kind.name, model, params, kind).stat().st_size
    for kind in (QUANTISED.F32, QUANTISED.F16, QUANTISED.Q8_0, QUANTISED.Q4_1)
  ]
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[3] < 0.3 * sizes[0]


def test_plan(tmp_path):
  model, params = small()
  path = write_gguf(tmp_path / "model.gguf", model, params)
  opened, found = sa_jax.from_pretrained(path, "0:1", layout="layers")
  assert opened.plan == SharingPlan.parse("0:1", 2)
  assert_trees_equal(found, sa_jax.prune(params, opened.plan))
  assert set(sa_jax.inspect(path, "0:1").dropped) == {
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
  }


def test_convert_without_a_tokenizer(tmp_path):
  model, params = small()
  path = write_gguf(tmp_path / "model.gguf", model, params)
  sa_jax.convert(path, tmp_path / "out", "0:1", None)
  opened, found = sa_jax.from_pretrained(tmp_path / "out", layout="layers")
  assert_trees_equal(found, sa_jax.prune(params, opened.plan))
  assert not (tmp_path / "out" / "tokenizer.json").exists()


class TestDamaged:
  def refuse(self, path: Path, message: str) -> None:
    before = set(path.parent.iterdir())
    with pytest.raises(ValueError, match=message):
      sa_jax.convert(path, path.parent / "out")
    assert set(path.parent.iterdir()) == before

  def test_empty(self, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    self.refuse(tmp_path / "model.gguf", "is not a GGUF file")

  @pytest.mark.parametrize("kept", [4, 8, 20, 60, 200, 700, 0.3, 0.5, 0.99])
  def test_truncated(self, tmp_path, kept):
    content = write_gguf(tmp_path / "whole.gguf", *small()).read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    self.refuse(tmp_path / "model.gguf", "model.gguf is not a whole GGUF file")

  @pytest.mark.parametrize("position", [4, 8, 16, 24, 40])
  def test_corrupted(self, tmp_path, position):
    content = bytearray(write_gguf(tmp_path / "whole.gguf", *small()).read_bytes())
    content[position : position + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "model.gguf").write_bytes(content)
    self.refuse(tmp_path / "model.gguf", "model.gguf")

  def test_another_architecture(self, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    self.refuse(tmp_path / "model.gguf", "has the unsupported architecture 'mamba'; supported in GGUF are: llama, ")

  def test_unknown_tensor(self, tmp_path):
    def change(writer):
      writer.add_tensor("blk.1.attn_q.bias", np.zeros(32, np.float32))
      writer.add_tensor("blk.0.mystery.weight", np.zeros(32, np.float32))

    path = write_gguf(tmp_path / "model.gguf", *small(), change=change)
    with pytest.raises(ValueError, match="does not hold the model") as caught:
      sa_jax.from_pretrained(path)
    assert set(str(caught.value).split("\n  ")[1:]) == {
      "unknown: model.layers.1.self_attn.q_proj.bias [32]",
      "unknown: blk.0.mystery.weight [32]",
    }

  def test_rope_scaling(self, tmp_path):
    change = lambda writer: writer.add_string("llama.rope.scaling.type", "spiral")
    self.refuse(
      write_gguf(tmp_path / "model.gguf", *small(), change=change), "rope scaling 'spiral' .* not implemented"
    )

  @pytest.mark.parametrize(
    ("key", "value", "meaning"),
    [
      ("attention.scale", 0.5, "a custom scale of attention scores"),
      ("logit_scale", 0.25, "scaling of logits"),
      ("residual_scale", 0.25, "scaling of residual branches"),
      ("embedding_scale", 12.0, "scaling of embeddings"),
      ("attention.sliding_window", 4, "a sliding window"),
      ("rope.scaling.attn_factor", 2.0, "scaling of queries and keys"),
      ("attention.causal", False, "non-causal attention"),
      ("final_logit_softcapping", 30.0, "a soft cap of logits"),
      ("nextn_predict_layers", 1, "multi-token prediction"),
      ("novel", 1, "this unknown key"),
    ],
  )
  def test_values_that_are_not_read(self, tmp_path, key, value, meaning):
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32"}
    change = lambda writer: getattr(writer, kinds[type(value)])(f"llama.{key}", value)
    message = f"llama.{key} = {value!r}: {meaning} is not implemented"
    self.refuse(write_gguf(tmp_path / "model.gguf", *small(), change=change), message)

  @pytest.mark.parametrize(("key", "value"), [("attention.causal", True), ("expert_count", 0), ("vocab_size", 64)])
  def test_values_that_change_nothing(self, tmp_path, key, value):
    kinds = {bool: "add_bool", int: "add_uint32"}
    change = lambda writer: getattr(writer, kinds[type(value)])(f"llama.{key}", value)
    path = write_gguf(tmp_path / "model.gguf", *small(), change=change)
    assert sa_jax.from_pretrained(path)[0] == small()[0]

  def test_another_head_size(self, tmp_path):
    change = lambda writer: writer.add_key_length(16)
    self.refuse(write_gguf(tmp_path / "model.gguf", *small(), change=change), "rotary embedding on 8 of 16")

  def test_tokenizer_that_cannot_be_rebuilt(self, tmp_path, caplog):
    path = write_gguf(tmp_path / "model.gguf", *small(), change=lambda writer: writer.add_tokenizer_model("t5"))
    with pytest.raises(ValueError, match="a tokenizer of kind 't5', None, which cannot be rebuilt; supported are"):
      sa_jax.load_tokenizer(path)
    # The weights are another matter.
    sa_jax.convert(path, tmp_path / "ours", dtype=None)
    assert "which cannot be rebuilt" in caplog.text
    assert_trees_equal(sa_jax.from_pretrained(tmp_path / "ours")[1], sa_jax.from_pretrained(path)[1])


def test_metadata_are_read_as_the_gguf_package_reads_them(tmp_path):
  path = tmp_path / "a.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  fields = {
    "strings": ["", "a", "Grüße ☃", "x" * 1000], "integers": [1, -2, 3], "floats": [0.5, -1.5], "flags": [True, False],
    "one": ["alone"], "nested": [[1, 2], [3, 4]],
  }  # fmt: skip
  for name, values in fields.items():
    writer.add_array(f"test.{name}", values)
  writer.add_string("test.text", "text")
  writer.add_tensor("t", np.ones((2, 32), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  theirs, ours = gguf.GGUFReader(path), QuickReader(path)
  assert ours.fields.keys() == theirs.fields.keys()
  for name, field in theirs.fields.items():
    assert ours.fields[name].types == field.types
    assert ours.fields[name].contents() == field.contents()
  assert ours.fields["test.strings"].contents() == fields["strings"]
  np.testing.assert_array_equal(ours.tensors[0].data, theirs.tensors[0].data)
  whole = path.read_bytes()
  for cut in range(40, theirs.data_offset, 97):
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="is not a whole GGUF file"):
      sa_jax.load_tokenizer(path)
