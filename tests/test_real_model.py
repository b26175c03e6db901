"""SmolLM2-135M-Instruct on wikitext-2, against the perplexities of the PyTorch reference."""

import pytest

import sa_jax
from sa_jax import SharingPlan, Transformer

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def dense(smollm2):
  """The dense model, read once; the plans prune it."""
  return sa_jax.from_pretrained(smollm2, layout="layers")


@pytest.fixture(scope="module")
def rows(smollm2, data):
  """The first 4 × 512 tokens of the validation text."""
  text = (data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8")
  return sa_jax.rows_of(sa_jax.load_tokenizer(smollm2).encode(text[:40_000]), 512, 4)


def test_config(dense):
  config = dense[0].config
  wanted = sa_jax.ModelConfig.preset(
    "smollm2-135m", dtype="float32", param_dtype="float32", eos_token_ids=config.eos_token_ids
  )
  assert config == wanted
  assert sa_jax.cost(config, None).params == 134_515_008


# One text, one number each: sharing late costs little, sharing the middle costs much.
@pytest.mark.parametrize(("plan", "expected"), [("dense", 18.51), ("14:15-18", 35.4)])
def test_perplexity(dense, rows, plan, expected):
  model, params = dense
  shared = SharingPlan.parse(plan, model.config.num_layers)
  params = sa_jax.stack(sa_jax.prune(params, shared), shared)
  found = sa_jax.perplexity(Transformer(model.config, shared), params, rows, batch_size=2)
  assert found.tokens == 4 * 511
  assert found.perplexity == pytest.approx(expected, rel=3e-3)
