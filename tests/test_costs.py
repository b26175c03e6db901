"""What `cost` counts, against the real parameters, the real cache, and XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ModelConfig, SharingPlan, Transformer
from sa_jax.nn import Cache
from sa_jax.sharding import abstract_params
from tests import tiny

PLANS = ["dense", tiny.PLAN, "0:1-6", "2:3,5:6"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["runs", "layers"])
def test_parameters(plan, tied, layout):
  model = tiny.model(plan, tie_embeddings=tied, param_dtype="bfloat16")
  leaves = jax.tree.leaves(abstract_params(model, layout=layout))
  found = sa_jax.cost(model.config, plan)
  assert found.params == sum(leaf.size for leaf in leaves)
  assert found.param_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes(plan, dtype):
  """The cache that prefill really returns, and the empty one."""
  model = tiny.model(plan, dtype=dtype, param_dtype=dtype)
  found = sa_jax.cost(model.config, model.plan, batch=3, seq_len=5)
  params = abstract_params(model, layout="layers")
  tokens, lengths = jax.ShapeDtypeStruct((3, 5), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32)
  _, cache = jax.eval_shape(
    lambda params, *args: model.apply({"params": params}, *args, method="prefill"), params, tokens, lengths
  )
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == found.kv_cache_bytes
  empty = Cache.empty(model.config, model.plan, batch=3, capacity=5)
  assert empty.nbytes == found.kv_cache_bytes == 15 * found.kv_bytes_per_token
  assert jax.tree.map(lambda x: (x.shape, x.dtype), empty) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


def test_followers_cache_no_keys():
  model = tiny.model()
  cache = Cache.empty(model.config, model.plan, batch=2, capacity=4)
  assert cache.capacity == 4
  for layer, held in enumerate(cache.layers):
    assert held.values.shape == (2, 2, 4, 8)
    assert (held.keys is None) == (layer in model.plan.followers)


def dot_flops(function, *args) -> int:
  """Two FLOPs a multiply-add of every matrix product in the traced program (no loops in it)."""

  def count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        out, left = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
        total += 2 * int(np.prod(out)) * int(np.prod([left[axis] for axis in contracted]))
      assert equation.primitive.name not in ("scan", "while")
      for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
        if hasattr(inner, "jaxpr"):
          total += count(inner.jaxpr)
    return total

  return count(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("plan", PLANS)
def test_flops_against_the_program(plan):
  """The literal algorithm's products; the program computes the masked half of attention too, which is not counted."""
  batch, length = 3, 10
  model = tiny.model(plan, attention_state="attention_weights")
  config, params = model.config, abstract_params(model, layout="layers")
  apply = lambda params, tokens: model.apply({"params": params}, tokens)
  program = dot_flops(apply, params, jax.ShapeDtypeStruct((batch, length), jnp.int32))
  products = len(model.plan.anchors) + config.num_layers
  masked = batch * products * 2 * config.num_heads * config.head_dim * (length * (length - 1) // 2)
  assert sa_jax.cost(config, plan, batch, length).flops == program - masked


@pytest.mark.parametrize("plan", PLANS)
def test_decode_flops_against_the_program(plan):
  batch, length = 3, 10
  model = tiny.model(plan)
  params = abstract_params(model, layout="layers")
  cache = Cache.empty(model.config, model.plan, batch, length)
  step = lambda params, *args: model.apply({"params": params}, *args, method="step")
  one = jax.ShapeDtypeStruct((batch,), jnp.int32)
  assert sa_jax.cost(model.config, plan, batch, length).decode_flops == dot_flops(step, params, one, cache, one)


def test_flops_against_xla():
  """XLA's count has the element-wise work too, which grows slower than the products."""
  config = tiny.config(num_layers=2, embed_dim=128, mlp_dim=256, head_dim=32)
  model = Transformer(config, SharingPlan.parse("0:1", 2))
  params, tokens = abstract_params(model, layout="layers"), jax.ShapeDtypeStruct((2, 16), jnp.int32)
  lowered = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)).lower(params, tokens)
  counted = lowered.cost_analysis()["flops"]
  assert sa_jax.cost(config, model.plan, 2, 16).flops == pytest.approx(counted, rel=0.05)


def test_decode_reads():
  config = tiny.config(dtype="bfloat16", param_dtype="float32")
  found = sa_jax.cost(config, tiny.PLAN, batch=2, seq_len=9)
  # Of the embedding, two rows of D 32.
  assert found.decode_bytes == 4 * (found.params - 61 * 32 + 2 * 32) + found.kv_cache_bytes
  tied = sa_jax.cost(tiny.config(tie_embeddings=True), tiny.PLAN, batch=2, seq_len=9)
  assert tied.decode_bytes == tied.param_bytes + tied.kv_cache_bytes


@pytest.mark.parametrize(
  ("preset", "params", "kv_bytes"),
  [
    # As published; cache bytes a token are 2 (K and V) × layers × kv heads × head size × 2 bytes.
    ("llama-2-7b", 6_738_415_616, 524_288),
    ("llama-2-13b", 13_015_864_320, 819_200),
    ("llama-3-8b", 8_030_261_248, 131_072),
    ("smollm2-135m", 134_515_008, 23_040),
  ],
)
def test_presets(preset, params, kv_bytes):
  found = sa_jax.cost(ModelConfig.preset(preset), None)
  assert found.params == params
  assert found.kv_bytes_per_token == kv_bytes


def test_what_four_followers_save():
  config = ModelConfig.preset("llama-2-7b")
  dense, shared = (sa_jax.cost(config, plan) for plan in (None, "26:27-30"))
  assert dense.params - shared.params == 4 * 2 * 4096 * 4096
  assert dense.kv_bytes_per_token - shared.kv_bytes_per_token == 4 * 4096 * 2


def test_refused():
  with pytest.raises(ValueError, match="batch and seq_len must be at least 1, not 0 and 5"):
    sa_jax.cost(tiny.config(), None, batch=0, seq_len=5)
  with pytest.raises(ValueError, match="goes past the model"):
    sa_jax.cost(tiny.config(), "6:7")
  with pytest.raises(ValueError, match="the plan is for 3 layers, the model has 7"):
    sa_jax.cost(tiny.config(), SharingPlan.dense(3))


@pytest.mark.parametrize(
  "changes",
  [
    {"qkv_bias": True},
    {"output_bias": True, "mlp_bias": True},
    {"qk_norm": "head"},
    {"qk_norm": "heads", "pre_norms": False, "post_norms": True},
    {"norm": "layer", "norm_bias": True, "mlp": "plain", "mlp_bias": True, "head_bias": True},
    {"norm": "layer", "parallel": True, "shared_norm": True},
    {"norm": "layer", "norm_bias": True, "parallel": True, "qk_norm": "head"},
    {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": "head", "post_norms": True},
  ],
)
def test_parameters_of_other_families(changes):
  """Biases and further norms; a follower has none of those that hang on queries and keys."""
  model = tiny.model(**changes)
  leaves = jax.tree.leaves(abstract_params(model, layout="layers"))
  assert sa_jax.cost(model.config, model.plan).params == sum(leaf.size for leaf in leaves)


def test_a_window_bounds_what_attention_costs():
  """Layers 1 (anchor), 2 and 3 (its followers) see 3 tokens: of 5 queries 1 + 2 + 3 + 3 + 3 keys and not 15."""
  full, local = (tiny.config(window=window, local_layers=layers) for window, layers in ((None, ()), (3, (1, 2, 3))))
  costs = [sa_jax.cost(config, tiny.PLAN, batch=2, seq_len=5) for config in (full, local)]
  products = 2 * 4 * 8 * 4  # FLOPs a key: heads × head_dim, for scores in one layer and values in three
  assert costs[0].flops - costs[1].flops == 2 * products * (15 - 12)
  assert costs[0].decode_flops - costs[1].decode_flops == 2 * products * (5 - 3)
  assert costs[0].kv_cache_bytes == costs[1].kv_cache_bytes
