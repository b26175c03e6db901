"""Small models for tests: a config, random parameters, and the checkpoint files that would hold them."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from sa_jax import ModelConfig, SharingPlan, Transformer
from sa_jax.sharding import abstract_params

PLAN = "1:2-3,4:5-6"
"""Of 7 layers: a run of one group without followers, and a run of two groups with two."""


def config(**changes) -> ModelConfig:
  sizes = {
    "vocab_size": 61,
    "embed_dim": 32,
    "num_layers": 7,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
    "max_length": 64,
  }
  return ModelConfig(**(sizes | changes))


def model(plan: str = PLAN, **changes) -> Transformer:
  made = config(**changes)
  return Transformer(made, SharingPlan.parse(plan, made.num_layers))


def params(model: Transformer, layout: str = "layers", seed: int = 0):
  """Random NumPy parameters: norms near one, matrices large enough for sharp attention."""
  rng = np.random.default_rng(seed)

  def leaf(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    noise = rng.normal(size=shape.shape)
    return (1 + 0.1 * noise if shape.shape[-1] == noise.size else 0.2 * noise).astype(shape.dtype)

  return jax.tree.map(leaf, abstract_params(model, layout=layout))


def filled(params, width: int = 8):
  """Parameters in the layer layout with zeros behind values, up to this width: those of the same function."""

  def fill(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if "v_proj" in name:
      return np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, width - leaf.shape[-1])])
    return np.pad(leaf, [(0, 0), (0, width - leaf.shape[1]), (0, 0)]) if "o_proj/kernel" in name else leaf

  return jax.tree_util.tree_map_with_path(fill, params)


def tokens(batch: int, length: int, vocab_size: int = 61, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int32)


def tensors(model: Transformer, params) -> dict[str, np.ndarray]:
  """The parameters of a Llama, in the layer layout, under Hugging Face's names: matrices ``[out, in]``."""
  embed = model.config.embed_dim
  out = {"model.embed_tokens.weight": params["embed"]["embedding"], "model.norm.weight": params["final_norm"]["scale"]}
  if "lm_head" in params:
    out["lm_head.weight"] = params["lm_head"]["kernel"].T
  for layer, block in params["layers"].items():
    prefix = f"model.layers.{layer}"
    out[f"{prefix}.input_layernorm.weight"] = block["attention_norm"]["scale"]
    out[f"{prefix}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
    for name, leaf in block["attention"].items():
      shape = (-1, embed) if name == "o_proj" else (embed, -1)
      out[f"{prefix}.self_attn.{name}.weight"] = leaf["kernel"].reshape(shape).T
    for name, leaf in block["mlp"].items():
      out[f"{prefix}.mlp.{name}.weight"] = leaf["kernel"].T
  return {name: np.ascontiguousarray(tensor) for name, tensor in out.items()}


def write_hf(folder: Path, model: Transformer, params, shards: int = 1, spelling: str = "v5") -> Path:
  """A Hugging Face folder that holds the parameters."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(model.config.to_hf(spelling)))
  held = tensors(model, params)
  if shards == 1:
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  weight_map = {}
  for number in range(shards):
    name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
    part = {key: held[key] for key in sorted(held)[number::shards]}
    weight_map |= dict.fromkeys(part, name)
    save_file(part, folder / name, metadata={"format": "pt"})
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def arrays_of(path: Path) -> dict[str, np.ndarray]:
  """A ``.npz`` file's arrays. The file is closed: what is closed by the garbage collector fails some other test."""
  with np.load(path) as stored:
    return dict(stored)


def assert_trees_equal(left, right) -> None:
  """Same structure, dtypes and bits."""
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
