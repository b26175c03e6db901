"""Adapters, gradual sharing and distillation: what each is equal to, and what it does not copy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sa_jax
from sa_jax import SharingPlan, Transformer, nn
from sa_jax.sharding import abstract_params
from sa_jax.train import (
  Batch,
  LoraConfig,
  abstract_adapters,
  adapted,
  attach,
  distill,
  init_adapters,
  make_eval,
  make_state,
  make_step,
  merge,
  next_token,
  rising,
)  # fmt: skip
from tests import tiny

CONFIG = tiny.config(num_layers=3)
PLAN = SharingPlan.parse("0:1-2", 3).with_head_maps({2: (1, 0, 3, 2)})
STUDENT, WHOLE = Transformer(CONFIG, PLAN), nn.GradualTransformer(CONFIG, PLAN)
DENSE = Transformer(CONFIG, SharingPlan.dense(3))
TOKENS = jnp.asarray(tiny.tokens(2, 12))
WEIGHTS = np.random.default_rng(1).uniform(size=(2, 12)).astype(np.float32)
BATCH = Batch(TOKENS, jnp.asarray(WEIGHTS), jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], jnp.int32))


@functools.cache
def dense_layers():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


@functools.cache
def whole():
  return sa_jax.stack_unpruned(dense_layers(), PLAN)


def close(a, b, atol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), a, b)


class TestGradual:
  def test_parameters_are_the_dense_models_stacked_by_the_plan(self):
    shapes = abstract_params(WHOLE)
    assert jax.tree.map(jnp.shape, whole()) == jax.tree.map(jnp.shape, shapes)
    tiny.assert_trees_equal(sa_jax.unstack(whole(), PLAN), dense_layers())

  def test_it_goes_from_dense_to_the_plan(self):
    logits = jax.jit(lambda share: WHOLE.apply({"params": whole()}, TOKENS, None, BATCH.segments, share=share))
    dense = jax.jit(DENSE.apply)({"params": dense_layers()}, TOKENS, None, BATCH.segments)
    shared = jax.jit(STUDENT.apply)({"params": sa_jax.prune(whole(), PLAN)}, TOKENS, None, BATCH.segments)
    close(logits(jnp.float32(0)), dense)
    close(logits(jnp.float32(1)), shared)
    assert np.abs(dense - shared).max() > 0.1
    close(
      jax.jit(lambda params: WHOLE.apply({"params": params}, TOKENS, None, BATCH.segments, share=0.0))(whole()), dense
    )

  def test_followers_are_rotated_as_in_the_dense_model(self):
    """SmolLM3's followers without rotary embedding behind an anchor with one, and the reverse."""
    config = tiny.config(num_layers=4, local_layers=(2,), local_rope=sa_jax.ops.RopeConfig(scaling="none"))
    dense = Transformer(config, SharingPlan.dense(4))
    layers = tiny.params(dense)
    want = jax.jit(dense.apply)({"params": layers}, TOKENS)
    for plan in (SharingPlan.parse("1:2-3", 4), SharingPlan.parse("0:1,2:3", 4)):
      model = nn.GradualTransformer(config, plan)
      apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS, share=0.0))
      close(apply(sa_jax.stack_unpruned(layers, plan)), want)

  def test_its_weights_are_the_mixture(self):
    """One follower right after its anchor: the same block output as with weights mixed by hand."""
    config = tiny.config(num_layers=2)
    plan = SharingPlan.parse("0:1", 2)
    layers = tiny.params(Transformer(config, SharingPlan.dense(2)))
    x = TOKENS
    dense, model = Transformer(config, SharingPlan.dense(2)), nn.GradualTransformer(config, plan)
    states = jax.jit(lambda params: [state.weights() for state in dense.apply({"params": params}, x, method="states")])
    mixed = 0.3 * states(layers)[0] + 0.7 * states(layers)[1]
    mix = jax.jit(lambda params: model.apply({"params": params}, x, share=0.3, mutable=[nn.BLOCK_OUTPUTS]))
    _, kept = mix(sa_jax.stack_unpruned(layers, plan))
    run = kept[nn.BLOCK_OUTPUTS]["runs"]["0"]
    after_anchor, got = run["anchor"]["x"][0], run["followers"]["x"][0, 0]
    block = nn.FollowerBlock(config)
    follower = sa_jax.prune(layers, plan)["layers"]["1"]
    close(got, jax.jit(block.apply)({"params": follower}, after_anchor, nn.AttentionWeights(mixed)))

  def test_share_rises_with_the_step(self):
    share = rising(10, start=5)
    assert [float(share(jnp.int32(step))) for step in (0, 5, 10, 15, 100)] == [0, 0, 0.5, 1, 1]
    objective = jax.jit(next_token(WHOLE, share=share))
    at = lambda step: float(objective(whole(), None, BATCH, jnp.int32(step))[0])
    dense = make_eval(next_token(DENSE))(sa_jax.stack(dense_layers(), DENSE.plan), None, BATCH)[0]
    shared = make_eval(next_token(STUDENT))(sa_jax.prune(whole(), PLAN), None, BATCH)[0]
    assert at(5) == pytest.approx(float(dense), rel=1e-5)
    assert at(15) == pytest.approx(float(shared), rel=1e-5)
    with pytest.raises(ValueError, match="at least 1 step"):
      rising(0)

  def test_weights_in_memory_cannot_be_mixed(self):
    with pytest.raises(ValueError, match="query_key"):
      nn.GradualTransformer(dataclasses.replace(CONFIG, attention_state="attention_weights"), PLAN)


LORA = LoraConfig(rank=3, alpha=5.0)


def random_adapters(model=STUDENT, config=LORA, layout="runs"):
  made = abstract_adapters(model, config, layout=layout)
  leaves, structure = jax.tree.flatten(made)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(structure, [(0.3 * rng.normal(size=x.shape)).astype(x.dtype) for x in leaves])


class TestLora:
  def test_fresh_adapters_change_nothing(self):
    base = sa_jax.prune(whole(), PLAN)
    fresh = jax.jit(lambda key: init_adapters(STUDENT, LORA, key))(jax.random.key(0))
    params = attach(base, fresh, LORA)
    apply = jax.jit(lambda params: STUDENT.apply({"params": params}, TOKENS))
    np.testing.assert_array_equal(apply(params), apply(base))

  @pytest.mark.parametrize("layout", ["runs", "layers"])
  def test_merged_is_adapted(self, layout):
    base = sa_jax.prune(dense_layers() if layout == "layers" else whole(), PLAN)
    adapters = random_adapters(layout=layout)
    apply = jax.jit(lambda params: STUDENT.apply({"params": params}, TOKENS))
    merged = merge(base, adapters, LORA)
    close(apply(attach(base, adapters, LORA)), apply(merged), atol=2e-5)
    assert np.abs(apply(merged) - apply(base)).max() > 0.1
    assert jax.tree.structure(merged) == jax.tree.structure(base)

  def test_merged_by_hand(self):
    base, adapters = sa_jax.prune(dense_layers(), PLAN), random_adapters(layout="layers")
    merged = merge(base, adapters, LORA)["layers"]["2"]["attention"]["o_proj"]["kernel"]
    pair = adapters["layers"]["2"]["attention"]["o_proj"]
    want = np.einsum("NHr,rD->NHD", pair["lora_a"], pair["lora_b"]) * 5 / 3
    close(merged - base["layers"]["2"]["attention"]["o_proj"]["kernel"], want)

  def test_only_targets_have_adapters(self):
    made = abstract_adapters(STUDENT, LoraConfig(targets=("q_proj", "down_proj")))
    paths = {
      jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(made)
    }
    assert "runs/0/anchor/attention/q_proj/lora_a" in paths
    assert "runs/0/followers/mlp/down_proj/lora_b" in paths
    assert not any("followers/attention" in path or "gate_proj" in path for path in paths)
    with pytest.raises(ValueError, match=r"not \['kv_proj'\]"):
      LoraConfig(targets=("kv_proj",))

  def test_gradients_are_of_adapters_alone_and_nothing_as_large_as_a_kernel_is_kept(self):
    model = tiny.model("0:1", num_layers=2, mlp_dim=4096, embed_dim=64)
    config = LoraConfig(rank=2, targets=("up_proj",))
    base, adapters = abstract_params(model), jax.eval_shape(lambda: init_adapters(model, config, jax.random.key(0)))
    step = make_step(adapted(next_token(model), config), optax.sgd(1.0))
    state = jax.eval_shape(functools.partial(make_state, optax.sgd(1.0)), adapters)
    compiled = step.lower(
      state, base, Batch(jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    )
    kernels = 2 * 3 * 64 * 4096 * 4
    assert compiled.compile().memory_analysis().temp_size_in_bytes < kernels / 3


class TestDistill:
  def test_student_and_teacher_share_one_copy(self):
    """Of the dense model's arrays; the argument bytes say so, and so do the buffers."""
    base = sa_jax.prune(whole(), PLAN)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(whole())}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(base)} < pointers

    optimizer = optax.sgd(1.0)
    objective = adapted(distill(STUDENT, WHOLE), LORA, base=lambda frozen: sa_jax.prune(frozen, PLAN))
    state = make_state(optimizer, random_adapters())
    compiled = make_step(objective, optimizer).lower(state, whole(), BATCH).compile()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert compiled.memory_analysis().argument_size_in_bytes <= 1.02 * (size(whole()) + size(state)) + size(BATCH)
    frozen = jax.tree.map(np.asarray, whole())
    after, metrics = compiled(state, whole(), BATCH)
    assert metrics.finite == 1
    tiny.assert_trees_equal(frozen, jax.tree.map(np.asarray, whole()))
    assert (
      max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (after.params, random_adapters())))) > 0
    )

  def test_a_student_like_its_teacher_has_nothing_to_learn(self):
    objective = distill(WHOLE, WHOLE, alpha=1.0, temperature=2.0, hidden_weight=1.0, share=rising(10))
    total, weight = jax.jit(objective)(whole(), whole(), BATCH, jnp.int32(0))
    assert float(total) == pytest.approx(0, abs=1e-5)
    assert float(weight) == pytest.approx(WEIGHTS[:, 1:].sum(), rel=1e-6)

  def test_the_teacher_is_the_dense_model(self):
    of = lambda teacher, params: float(
      jax.jit(distill(STUDENT, teacher))(sa_jax.prune(whole(), PLAN), params, BATCH, jnp.int32(0))[0]
    )
    stacked = sa_jax.stack(dense_layers(), DENSE.plan)
    assert of(WHOLE, whole()) == pytest.approx(of(DENSE, stacked), rel=1e-5)

  def test_hidden_states_by_hand(self):
    student = sa_jax.prune(whole(), PLAN)
    at = lambda weight: float(
      jax.jit(distill(STUDENT, WHOLE, hidden_weight=weight))(student, whole(), BATCH, jnp.int32(0))[0]
    )
    keep = lambda model, params, **share: jax.jit(
      lambda params: model.apply({"params": params}, TOKENS, None, BATCH.segments, mutable=[nn.BLOCK_OUTPUTS], **share)[
        1
      ][nn.BLOCK_OUTPUTS]
    )(params)
    theirs, ours = keep(WHOLE, whole(), share=0.0), keep(STUDENT, student)
    flat = lambda tree: np.concatenate([np.asarray(x).reshape(-1, 2, 12, 32) for x in jax.tree.leaves(tree)])
    theirs, ours = flat(theirs), flat(ours)
    assert theirs.shape[0] == 3
    distance = (((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1)).mean(0)
    assert at(2.0) - at(0.0) == pytest.approx(2 * (distance[:, :-1] * WEIGHTS[:, 1:]).sum(), rel=1e-4)

  def test_a_zero_embedding_at_padding_is_no_distance(self):
    """As ``padding_idx`` leaves it: the block outputs of both are zero there."""
    frozen = whole() | {"embed": {"embedding": whole()["embed"]["embedding"].at[0].set(0.0)}}
    tokens = TOKENS.at[:, 8:].set(0)
    batch = Batch(tokens, BATCH.weights.at[:, 8:].set(0.0), jnp.ones((2, 12), jnp.int32).at[:, 8:].set(0))
    objective = distill(STUDENT, WHOLE, hidden_weight=1.0)
    total, _ = jax.jit(objective)(sa_jax.prune(frozen, PLAN), frozen, batch, jnp.int32(0))
    assert np.isfinite(total)

  def test_blocks_that_do_not_correspond(self):
    with pytest.raises(ValueError, match="a GradualTransformer of the student's plan"):
      distill(STUDENT, DENSE, hidden_weight=1.0)
