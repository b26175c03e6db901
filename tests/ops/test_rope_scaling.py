"""Each rotary scaling against transformers, far beyond the original length."""

import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCALINGS = {
  "default": {},
  "linear": {"factor": 4.0},
  "dynamic": {"factor": 4.0},
  "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
  "yarn-given": {
    "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2,
    "truncate": False,
  },
  "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.3},
  "llama3": {
    "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  },
}  # fmt: skip


@pytest.mark.parametrize("length", [48, 500])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling(name, length):
  values = {"rope_type": name.split("-")[0], "rope_theta": 50_000.0, **SCALINGS[name]}
  theirs = transformers.LlamaConfig(
    vocab_size=8, hidden_size=64, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
    max_position_embeddings=64, rope_parameters=values,
  )  # fmt: skip
  config = sa_jax.ModelConfig.from_hf(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"})
  x = np.random.default_rng(0).normal(size=(1, length, 1, 32)).astype(np.float32)
  rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
  cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
  half = torch.from_numpy(x).split(16, -1)
  expected = torch.from_numpy(x) * cos[:, :, None] + torch.cat([-half[1], half[0]], -1) * sin[:, :, None]
  frequencies = ops.rope_frequencies(config.rope, config.head_dim, length)
  found = ops.apply_rope(jnp.asarray(x), jnp.arange(length), frequencies, config.rope.magnitude)
  # An angle is a position times a frequency, in whose last bits the two libraries' powers differ on some processors.
  np.testing.assert_allclose(found, expected, atol=2.5e-7 * length)
  assert sa_jax.ModelConfig.from_hf(config.to_hf()) == config == sa_jax.ModelConfig.from_hf(config.to_hf("v4"))


def test_dynamic_rows():
  """Each row is stretched by its own length."""
  rope = ops.RopeConfig(scaling="dynamic", factor=2.0, original_max_length=16)
  rows = ops.rope_frequencies(rope, 8, jnp.array([4, 40]))
  np.testing.assert_allclose(rows[0], ops.rope_frequencies(rope, 8), rtol=1e-6)
  np.testing.assert_allclose(rows[1], ops.rope_frequencies(rope, 8, 40), rtol=1e-6)
  assert rows[1, -1] < rows[0, -1] / 1.9
