"""Quantised checkpoints, packed here number by number, against folders of the weights that they stand for."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

import sa_jax
from tests.formats import hf_models

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
GROUP = 16


def low_bits(numbers, bits=4):
  """Integers side by side in one int32, the first in its lowest bits."""
  return np.uint32(sum(int(number) << (bits * place) for place, number in enumerate(numbers))).view(np.int32)


def fp8(name, shape, scale_name, scale_shape, block):
  weight = RNG.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
  scale = RNG.uniform(0.5, 2, scale_shape).astype(np.float32)
  whole = np.array([[scale[i // block[0], j // block[1]] for j in range(shape[1])] for i in range(shape[0])])
  return {f"{name}.weight": weight, f"{name}.{scale_name}": scale}, weight.astype(np.float32) * whole


def fp8_blocks(name, shape):
  return fp8(name, shape, "weight_scale_inv", (-(-shape[0] // 32), -(-shape[1] // 16)), (32, 16))


def fp8_rows(name, shape):
  return fp8(name, shape, "weight_scale", (shape[0], 1), (1, shape[1]))


def fp8_tensor(name, shape):
  stored, weight = fp8(name, shape, "weight_scale", (1, 1), shape)
  stored[f"{name}.weight_scale"] = stored[f"{name}.weight_scale"].reshape(())
  return stored | {f"{name}.input_scale": np.float32(1.0).reshape(())}, weight


def awq(name, shape):
  outputs, inputs = shape
  numbers, zeros = RNG.integers(0, 16, (inputs, outputs)), RNG.integers(0, 16, (inputs // GROUP, outputs))
  scales = RNG.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
  order = [0, 2, 4, 6, 1, 3, 5, 7]
  pack = lambda rows: np.array(
    [[low_bits([row[start + place] for place in order]) for start in range(0, outputs, 8)] for row in rows]
  )
  weight = [
    [(numbers[i, o] - zeros[i // GROUP, o]) * np.float32(scales[i // GROUP, o]) for i in range(inputs)]
    for o in range(outputs)
  ]
  stored = {f"{name}.qweight": pack(numbers), f"{name}.qzeros": pack(zeros), f"{name}.scales": scales}
  return stored, np.array(weight, np.float32)


def gptq(name, shape, bits=4, above=1):
  outputs, inputs = shape
  most, per = 1 << bits, 32 // bits
  numbers = RNG.integers(0, most, (inputs, outputs))
  zeros = RNG.integers(0, most, (inputs // GROUP, outputs))
  scales = RNG.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
  groups = RNG.permutation(np.arange(inputs) // GROUP).astype(np.int32)
  rows = [[low_bits(numbers[i : i + per, o], bits) for o in range(outputs)] for i in range(0, inputs, per)]
  packed = [[low_bits(row[o : o + per], bits) for o in range(0, outputs, per)] for row in zeros]
  weight = [
    [(numbers[i, o] - (zeros[groups[i], o] + above)) * np.float32(scales[groups[i], o]) for i in range(inputs)]
    for o in range(outputs)
  ]
  stored = {"qweight": np.array(rows), "qzeros": np.array(packed), "scales": scales, "g_idx": groups}
  return {f"{name}.{each}": array for each, array in stored.items()}, np.array(weight, np.float32)


def int8(name, shape):
  weight, scale = RNG.integers(-127, 128, shape).astype(np.int8), RNG.uniform(1, 3, shape[0]).astype(np.float32)
  stored = {f"{name}.weight": weight, f"{name}.SCB": scale, f"{name}.weight_format": np.uint8(0).reshape(())}
  return stored, weight * scale[:, None] / 127


def nf4(name, shape, nested=True):
  size, outer, offset = 32, 4, 0.25
  numbers = RNG.integers(0, 16, shape[0] * shape[1])
  values = np.sort(RNG.uniform(-1, 1, 16)).astype(np.float32)
  stored = {
    "weight": np.array([numbers[i] * 16 + numbers[i + 1] for i in range(0, len(numbers), 2)], np.uint8)[:, None]
  }
  blocks = len(numbers) // size
  most = RNG.uniform(0.5, 2, blocks).astype(np.float32)
  state = {"quant_type": "nf4", "blocksize": size, "dtype": "float16", "shape": list(shape)}
  stored |= {"weight.absmax": most, "weight.quant_map": values}
  if nested:
    codes, table = RNG.integers(0, 256, blocks).astype(np.uint8), RNG.uniform(-1, 1, 256).astype(np.float32)
    scales = RNG.uniform(0.5, 2, -(-blocks // outer)).astype(np.float32)
    most = np.array([table[code] * scales[i // outer] + np.float32(offset) for i, code in enumerate(codes)])
    state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": offset}
    stored |= {"weight.absmax": codes, "weight.nested_absmax": scales, "weight.nested_quant_map": table}
  stored["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
  weight = np.array([values[number] * most[i // size] for i, number in enumerate(numbers)], np.float32).reshape(shape)
  return {f"{name}.{each}": array for each, array in stored.items()}, weight


METHODS = {
  "fp8 blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 16], "activation_scheme": "dynamic"}),
  "fp8 rows": (fp8_rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
  "fp8 tensor": (fp8_tensor, {"quant_algo": "FP8", "kv_cache_scheme": "FP8", "ignore": ["lm_head"]}),
  "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
  "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
  "gptq v2": (
    lambda name, shape: gptq(name, shape, 8, 0),
    {"quant_method": "gptq", "bits": 8.0, "checkpoint_format": "gptq_v2"},
  ),
  "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
  "nf4": (lambda name, shape: nf4(name, shape, False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
  "nf4 nested": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plain") / "model"
  hf_models.build("llama", folder, num_hidden_layers=1, head_dim=8, attention_bias=False, mlp_bias=False)
  return folder


def write(folder, plain, method, settings):
  """A quantised folder, and one of the weights that it stands for."""
  from safetensors.torch import load_file, save_file

  config = json.loads((plain / "config.json").read_text())
  stored, meant = {}, {}
  for key, tensor in load_file(plain / "model.safetensors").items():
    made, weight = {key: tensor.numpy()}, tensor.numpy()
    if "_proj" in key:
      made, weight = method(key.removesuffix(".weight"), tuple(tensor.shape))
    stored |= made
    meant[key] = weight.astype(np.float32)
  for name, tensors, more in (("quantised", stored, {"quantization_config": settings}), ("meant", meant, {})):
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config | more))
    as_torch = lambda array: (
      torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
      if array.dtype == ml_dtypes.float8_e4m3fn
      else torch.from_numpy(np.array(array)).reshape(array.shape)
    )
    save_file({key: as_torch(array) for key, array in tensors.items()}, folder / name / "model.safetensors")
  return folder / "quantised", folder / "meant"


@pytest.mark.parametrize("name", METHODS)
def test_the_weights_that_are_meant(name, plain, tmp_path):
  quantised, meant = write(tmp_path, plain, *METHODS[name])
  expected = sa_jax.from_pretrained(meant, layout="layers")[1]
  found = sa_jax.from_pretrained(quantised, layout="layers", dtype="float32")[1]
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"quant_method": "aqlm"}, "quantised by aqlm, which is not read; fp8, .*: open the original, or a GGUF file"),
    ({"bits": 4, "group_size": 64}, "quantised by a method without a name"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'; must be 'gemm' or 'GEMM'"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format is 'pack-quantized'"),
    ({"quant_method": "fp8", "weight_block_size": [0, "x"]}, "weight_block_size is"),
    ({"quant_algo": "FP8", "weight_block_size": [32]}, "weight_block_size is"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    (
      {"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": {"config_groups": {}}},
      "rotates activations between layers",
    ),
    ("int4", "quantised by a method without a name"),
  ],
)
def test_other_methods_are_named(settings, message):
  values = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "quantization_config": settings,
  }  # fmt: skip
  with pytest.raises(sa_jax.UserError, match=message):
    sa_jax.ModelConfig.from_hf(values)


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("fp8 blocks", lambda t, key: t.pop(f"{key}.weight_scale_inv"), "not a matrix with a .*weight_scale"),
    ("awq", lambda t, key: t.pop(f"{key}.qzeros"), "qzeros is missing"),
    (
      "awq",
      lambda t, key: t.update({f"{key}.scales": torch.ones(3, 3)}),
      "does not match its other quantisation tensors",
    ),
    ("gptq", lambda t, key: t[f"{key}.g_idx"].fill_(9), "g_idx contains group 9, but there are only 2 groups"),
    (
      "nf4",
      lambda t, key: t[f"{key}.weight.quant_state.bitsandbytes__nf4"].zero_(),
      "does not describe a 4-bit tensor",
    ),
    ("awq", lambda t, key: t.update({f"{key}.qweight": t[f"{key}.qweight"][None]}), "must be a matrix"),
    ("nf4", lambda t, key: t.update({f"{key}.weight.quant_map": torch.ones(8)}), r"\[8\]; must have 16 elements"),
    (
      "nf4 nested",
      lambda t, key: t.update({f"{key}.weight.absmax": t[f"{key}.weight.absmax"].float()}),
      "absmax has dtype float32; must be uint8",
    ),
    ("int8", lambda t, key: t.pop(f"{key}.SCB"), "q_proj.weight in .* is I8; must be one of F64, F32, F16, BF16"),
  ],
)
def test_damaged_files_are_refused(name, change, message, plain, tmp_path):
  from safetensors.torch import load_file, save_file

  quantised, _ = write(tmp_path, plain, *METHODS[name])
  tensors = load_file(quantised / "model.safetensors")
  change(tensors, "model.layers.0.self_attn.q_proj")
  save_file(tensors, quantised / "model.safetensors")
  with pytest.raises(sa_jax.UserError, match=message):
    sa_jax.from_pretrained(quantised)
