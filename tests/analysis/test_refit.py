"""Refit against least squares in NumPy, and its promises."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax.analysis import align, ridge, walk
from sa_jax.analysis import refit as refit_module
from sa_jax.analysis.refit import Refit, refit
from sa_jax.config import ModelConfig
from sa_jax.nn import Middle, PlanArrays, PlannedBlock
from tests import tiny

CONFIG = ModelConfig(
  vocab_size=47, embed_dim=24, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=32, eos_token_ids=()
)
DENSE = sa_jax.Transformer(CONFIG, sa_jax.SharingPlan.dense(5))
PLAN = sa_jax.SharingPlan.parse("0:1,2:3-4", 5).with_head_maps({4: (1, 1, 3, 0)})
TOKENS = np.random.default_rng(0).integers(0, 47, (16, 16), np.int32)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


def test_ridge_against_numpy():
  rng = np.random.default_rng(1)
  x, y, prior = rng.standard_normal((200, 12)), rng.standard_normal((200, 5)), rng.standard_normal((12, 5))
  sums = ridge.total(ridge.Sums.of(jnp.float32(x[i : i + 50]), jnp.float32(y[i : i + 50])) for i in range(0, 200, 50))
  penalty = 0.03 * np.trace(x.T @ x) / 12
  stacked = np.concatenate([x, np.sqrt(penalty) * np.eye(12)])
  want = np.linalg.lstsq(stacked, np.concatenate([y, np.sqrt(penalty) * prior]), rcond=None)[0]
  got, condition = ridge.solve(sums, jnp.float32(prior), 0.03)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert 0 < condition <= 1
  np.testing.assert_allclose(sums.error(got), np.sum((y - x @ want) ** 2), rtol=1e-5)
  lowered = np.sum((y - x @ prior) ** 2) - (np.sum((y - x @ want) ** 2) + penalty * np.sum((want - prior) ** 2))
  np.testing.assert_allclose(ridge.gain(sums, jnp.float32(prior), 0.03), lowered, rtol=1e-5)


def test_follower_against_numpy(params):
  """The first follower's W_O is the least-squares solution from its head outputs to the dense attention's output."""
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  result = refit(DENSE, params, plan, TOKENS, Refit(), chunk=16)
  trace = walk.dense_trace(CONFIG, params, walk.start(CONFIG, params, TOKENS, 16))
  states = DENSE.apply({"params": params}, TOKENS, method="states")
  block = params["layers"]["1"]
  x = np.asarray(trace[0][0].x, np.float64)
  normed = (
    x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * np.asarray(block["attention_norm"]["scale"])
  )
  values = np.repeat(np.einsum("BTD,DKH->BTKH", normed, block["attention"]["v_proj"]["kernel"]), 2, axis=2)
  heads = np.einsum("BNTS,BSNH->BTNH", np.asarray(states[0].weights(), np.float64), values).reshape(-1, 24)
  y, prior = np.asarray(trace[1][0].y, np.float64).reshape(-1, 24), block["attention"]["o_proj"]["kernel"]
  prior = np.asarray(prior, np.float64).reshape(24, 24)
  gram = heads.T @ heads
  penalty = 0.01 * np.trace(gram) / 24 * np.eye(24)
  want = np.linalg.solve(gram + penalty, heads.T @ y + penalty @ prior)
  got = result.params["layers"]["1"]["attention"]["o_proj"]["kernel"].reshape(24, 24)
  np.testing.assert_allclose(got, want, atol=1e-5)
  (report,) = result.reports
  assert report.before == pytest.approx(np.sum((y - heads @ prior) ** 2) / np.sum(y**2), rel=1e-4)
  assert report.after == pytest.approx(np.sum((y - heads @ want) ** 2) / np.sum(y**2), rel=1e-4)


@pytest.mark.parametrize("how", [Refit(), Refit(values=4, maps=True, mlp=True)])
def test_streaming_equals_one_batch_and_never_raises_the_error(params, how):
  whole, parts = (refit(DENSE, params, PLAN, TOKENS, how, chunk=chunk, on_device=chunk == 16) for chunk in (16, 5))
  assert whole.model.plan == parts.model.plan
  for mine, theirs in zip(whole.reports, parts.reports, strict=True):
    np.testing.assert_allclose(mine[2:4], theirs[2:4], rtol=1e-4)
    assert mine.after <= mine.before
  one, other = (made.model.apply({"params": made.params}, TOKENS[:2]) for made in (whole, parts))
  np.testing.assert_allclose(one, other, atol=2e-4)
  assert [(report.layer, report.part) for report in whole.reports if report.part == "attention"] == [
    (layer, "attention") for layer in (1, 3, 4)
  ]


def test_the_device_holds_a_chunk_however_much_text_there_is(params):
  """Between two layers nothing of the text is on the device: what is, parameters and sums, does not grow with it."""

  def most_bytes(rows: int, on_device: bool) -> int:
    seen = []

    def count(done, total):
      gc.collect()  # what nothing refers to does not count
      seen.append(sum(array.nbytes for array in jax.live_arrays()))

    refit(DENSE, params, PLAN, np.tile(TOKENS, (rows // 16, 1)), Refit(), chunk=8, on_device=on_device, progress=count)
    return max(seen)

  few, many = most_bytes(16, False), most_bytes(64, False)
  # A chunk's worth may differ, by what Python has not collected yet.
  assert many < few + 8 * 16 * 24 * 4 * 4
  assert most_bytes(64, True) > most_bytes(16, True) + 48 * 16 * 24 * 4 * 3


def test_each_ingredient_lowers_the_error_further(params):
  """Values after W_O, and a map chosen by error, each leave a smaller error in the first follower."""
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  after = [
    refit(DENSE, params, plan, TOKENS, how, chunk=16).reports[0].after
    for how in (Refit(), Refit(values=8), Refit(maps=True))
  ]
  assert after[1] < 0.9 * after[0]
  assert after[2] < after[0]


def test_the_refitted_model_is_nearer_to_the_dense_one(params):
  plain, pruned = align.shared_model(CONFIG, params, PLAN)
  text = np.random.default_rng(4).integers(0, 47, (96, 16), np.int32)
  result = refit(DENSE, params, PLAN, text, chunk=96)
  other = np.random.default_rng(5).integers(0, 47, (8, 16), np.int32)
  want = np.asarray(DENSE.apply({"params": params}, other))
  distance = lambda model, params: np.mean((np.asarray(model.apply({"params": params}, other)) - want) ** 2)
  assert distance(result.model, result.params) < 0.8 * distance(plain, pruned)


def test_map_by_refit_is_the_best_of_its_neighbours(params):
  trace = walk.dense_trace(CONFIG, params, walk.start(CONFIG, params, TOKENS, 16))
  fitted = [(walk.Chunk(trace[0][0].x, trace[0][0].state), trace[1][0])]
  block = params["layers"]["1"]
  found = align.map_by_refit(CONFIG, block, fitted, None, 0.01, sweeps=4)

  def error(head_map):
    plan = sa_jax.SharingPlan.parse("0:1", 5).with_head_maps({1: head_map})
    return refit(DENSE, params, plan, TOKENS, Refit(), chunk=16).reports[0].after

  best = error(found)
  assert best < error((0, 1, 2, 3))
  for head in range(4):
    changed = (*found[:head], (found[head] + 1) % 4, *found[head + 1 :])
    assert best < error(changed) + 1e-3


def test_undetermined_weights_are_refused(params):
  with pytest.raises(ValueError, match=r"layer 1 attention.*more text or a larger ridge"):
    refit(DENSE, params, PLAN, TOKENS[:1, :3], Refit(ridge=1e-12))
  with pytest.raises(ValueError, match="positive"):
    Refit(ridge=0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_of_half_precision_are_refitted_as_in_float32(params, dtype):
  """In float16 itself, the conjugate gradients divide by zero; strict promotion allows no mixture."""
  plan, how = sa_jax.SharingPlan.parse("0:1", 5), Refit(values=2)
  half = sa_jax.Transformer(dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype), DENSE.plan)
  (want,) = refit(DENSE, params, plan, TOKENS, how, chunk=16).reports
  made = refit(half, jax.tree.map(lambda leaf: leaf.astype(dtype), params), plan, TOKENS, how, chunk=16)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(made.params)} == {dtype}
  assert made.reports[0].after == pytest.approx(want.after, rel=0.02)


def test_rounding_makes_no_error_negative():
  """An error that is a difference of sums: of what is fitted exactly, only rounding is left."""
  rng = np.random.default_rng(3)
  for _ in range(20):
    x, weights = jnp.float32(rng.normal(size=(50, 6))), jnp.float32(rng.normal(size=(6, 4)))
    assert ridge.relative_error(ridge.Sums.of(x, x @ weights), weights) >= 0


def test_other_families(params):
  """Biases, two kinds of layers, norms after attention: a follower refitted onto itself is left as it is."""
  config = dataclasses.replace(
    CONFIG, window=4, local_layers=(0, 1), qkv_bias=True, output_bias=True, post_norms=True, attention_softcap=5.0
  )
  dense = sa_jax.Transformer(config, DENSE.plan)
  made = tiny.params(dense)
  first, second = made["layers"]["0"], made["layers"]["1"]
  # Layer 0 adds nothing, so layer 1 with its queries and keys attends as it does.
  silent = {name: {"scale": 0 * first[name]["scale"]} for name in ("attention_post_norm", "mlp_post_norm")}
  alike = {name: first["attention"][name] for name in ("q_proj", "k_proj")}
  second = second | {"attention": second["attention"] | alike, "attention_norm": first["attention_norm"]}
  made = made | {"layers": made["layers"] | {"0": first | silent, "1": second}}
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  result = refit(dense, made, plan, TOKENS, Refit(values=2), chunk=16)
  assert result.reports[0].before < 1e-5
  got = jax.jit(result.model.apply)({"params": result.params}, TOKENS)
  np.testing.assert_allclose(got, jax.jit(dense.apply)({"params": made}, TOKENS), atol=1e-4)
  with pytest.raises(ValueError, match="different keys"):
    refit(dense, made, sa_jax.SharingPlan.parse("1:2", 5), TOKENS)


def post_normed(**changes):
  config = dataclasses.replace(CONFIG, post_norms=True, norm_about_one=True, **changes)
  dense = sa_jax.Transformer(config, DENSE.plan)
  made = jax.tree.map(jnp.asarray, tiny.params(dense))
  return config, dense, made


def rms(x):
  return np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps)


def test_output_projections_before_a_norm_against_numpy():
  """W_O minimises the error after the norm's division; the MLP's projection that of the direction which is lacking."""
  config, dense, params = post_normed(output_bias=True, mlp_bias=True)
  trace = walk.dense_trace(config, params, walk.start(config, params, TOKENS, 16))
  before, (target,), block = walk.Chunk(trace[0][0].x, trace[0][0].state), trace[1], params["layers"]["1"]
  call = lambda method, *arguments: walk.call(config, block, method, *arguments)
  heads = call(PlannedBlock.heads, before.x, before.state, jnp.arange(4, dtype=jnp.int32))
  flat = lambda x: np.asarray(x, np.float64).reshape(-1, *np.shape(x)[2:])

  def want(x, y, prior, ridge):
    gram = x.T @ x
    penalty = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram + penalty, x.T @ y + penalty @ prior)

  result = refit(dense, params, sa_jax.SharingPlan.parse("0:1", 5), TOKENS, Refit(mlp=True), chunk=16)
  y, x = flat(target.y), flat(heads).reshape(-1, 24)
  bias, prior = (np.asarray(block["attention"]["o_proj"][name], np.float64) for name in ("bias", "kernel"))
  kernel = want(x / rms(y), (y - bias) / rms(y), prior.reshape(24, 24), 0.01)
  got = result.params["layers"]["1"]
  np.testing.assert_allclose(got["attention"]["o_proj"]["kernel"].reshape(24, 24), kernel, atol=2e-5)

  scale = lambda name: 1 + np.asarray(block[name]["scale"], np.float64)
  y = x @ kernel + bias
  middle = flat(before.x) + y / rms(y) * scale("attention_post_norm")
  hidden = flat(call(PlannedBlock.mlp_hidden, Middle(jnp.float32(middle)[None])))[:]
  bias, prior = (np.asarray(block["mlp"]["down_proj"][name], np.float64) for name in ("bias", "kernel"))
  y, gain = hidden @ prior + bias, scale("mlp_post_norm")
  error = flat(target.x) - middle - gain * y / rms(y)
  wanted = y / rms(y) + gain / (gain**2 + 0.01 * np.mean(gain**2)) * error
  wanted = wanted / rms(wanted)
  kernel = want(hidden / rms(y), wanted - bias / rms(y), prior, 0.3)
  np.testing.assert_allclose(got["mlp"]["down_proj"]["kernel"], kernel, atol=2e-4)


def test_refits_before_a_norm_lower_the_block_error_on_other_text():
  config, dense, params = post_normed()
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  text, other = (np.random.default_rng(seed).integers(0, 47, (64, 16), np.int32) for seed in (4, 5))
  trace = walk.dense_trace(config, params, walk.start(config, params, other, 64))
  before, want = walk.Chunk(trace[0][0].x, trace[0][0].state), np.asarray(trace[1][0].x)
  as_follower = PlanArrays.of_layer(1, config, False)

  def distance(attention, mlp=None):
    """Of the block's output on the other text, with the refitted projections that are named."""
    block = refit_module.with_kernel(params["layers"]["1"], "attention", "o_proj", attention)
    if mlp is not None:
      block = refit_module.with_kernel(block, "mlp", "down_proj", mlp)
    return np.mean((np.asarray(walk.advance(config, block, before, as_follower).x) - want) ** 2)

  made = refit(dense, params, plan, text, Refit(mlp=True), chunk=64)
  assert all(report.after < report.before for report in made.reports)
  found = made.params["layers"]["1"]
  attention, mlp = found["attention"]["o_proj"]["kernel"], found["mlp"]["down_proj"]["kernel"]
  plain = distance(params["layers"]["1"]["attention"]["o_proj"]["kernel"])
  assert distance(attention) < 0.9 * plain
  assert distance(attention, mlp) < 0.95 * distance(attention)


@pytest.mark.parametrize("shared", [True, False])
def test_the_mlp_of_a_parallel_block_against_numpy(shared):
  """It reads the block's input, and what it should add is what the dense output lacks, over the residual scale."""
  config = dataclasses.replace(
    CONFIG, norm="layer", norm_bias=True, mlp="plain", mlp_bias=True, parallel=True, shared_norm=shared,
    residual_scale=0.5,
  )  # fmt: skip
  dense = sa_jax.Transformer(config, DENSE.plan)
  made = tiny.params(dense)
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  trace = walk.dense_trace(config, made, walk.start(config, made, TOKENS, 16))
  before, (target,), block = trace[0][0].x, trace[1], made["layers"]["1"]
  result = refit(dense, made, plan, TOKENS, Refit(mlp=True), chunk=16)
  refitted = result.params["layers"]["1"]
  apply = lambda weights, method, *args: walk.call(config, weights, method, *args)
  state = trace[0][0].state
  heads = apply(refitted | {"attention": block["attention"]}, PlannedBlock.heads, before, state, jnp.arange(4))
  y = np.einsum("btnh,nhd->btd", heads, refitted["attention"]["o_proj"]["kernel"])
  x = np.asarray(before, np.float64)
  norm = block["attention_norm" if shared else "mlp_norm"]
  normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
  up = block["mlp"]["up_proj"]
  z = (normal * norm["scale"] + norm["bias"]) @ up["kernel"] + up["bias"]
  hidden = (z / (1 + np.exp(-z))).reshape(-1, z.shape[-1])
  lacking = (np.asarray(target.x, np.float64) - x - 0.5 * y) / 0.5 - np.asarray(block["mlp"]["down_proj"]["bias"])
  prior, gram = np.asarray(block["mlp"]["down_proj"]["kernel"], np.float64), hidden.T @ hidden
  penalty = 0.3 * np.trace(gram) / len(gram) * np.eye(len(gram))
  wanted = np.linalg.solve(gram + penalty, hidden.T @ lacking.reshape(-1, lacking.shape[-1]) + penalty @ prior)
  np.testing.assert_allclose(refitted["mlp"]["down_proj"]["kernel"], wanted, atol=2e-4)


def test_head_maps_by_refit_error_need_few_heads():
  for name, fits in (("smollm2-135m", True), ("llama-3-8b", False), ("llama-2-7b", False)):
    config = ModelConfig.preset(name)
    assert align.can_map_by_refit(config) is fits
    if not fits:
      with pytest.raises(ValueError, match="too many features to choose head maps by refit error: choose"):
        Refit(maps=True).check(config)
