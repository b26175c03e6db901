"""The whole model: one result however it is computed, its size, its memory, and where gradients flow."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax import SharingPlan, Transformer, UserError, ops, stack
from sa_jax.nn import AnchorBlock, FollowerBlock, Runs
from sa_jax.sharding import abstract_params
from tests import tiny

STATES = ("query_key", "attention_weights")
TOKENS = tiny.tokens(2, 12)
PADDED = tiny.tokens(3, 12, seed=1)
LENGTHS = np.array([7, 12, 1], np.int32)
# Two groups of two layers: the smallest plan with both scans, for programs with a backward pass.
SMALL = {"plan": "0:1,2:3", "num_layers": 4}


def loss(model, params, tokens):
  logits = model.apply({"params": params}, tokens)
  return -ops.token_log_likelihoods(logits[:, :-1], tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model, params, tokens, lengths=None):
  return model.apply({"params": params}, tokens, lengths)


@functools.partial(jax.jit, static_argnames="model")
def loss_and_gradient(model, params, tokens):
  return jax.value_and_grad(functools.partial(loss, model))(params, tokens)


@pytest.fixture(scope="module", params=STATES)
def model(request):
  return tiny.model(attention_state=request.param)


@pytest.fixture(scope="module")
def layers(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def unrolled(model, layers):
  return np.asarray(logits_of(model, layers, TOKENS))


class TestOneResult:
  """Scanned = unrolled = in a padded batch = with a cache = under remat, on compiled programs."""

  def test_scanned(self, model, layers, unrolled):
    scanned = logits_of(model, stack(layers, model.plan), TOKENS)
    np.testing.assert_allclose(scanned, unrolled, rtol=0, atol=1e-5)

  @pytest.mark.parametrize("layout", ["layers", "runs"])
  def test_in_a_padded_batch(self, model, layers, layout):
    params = layers if layout == "layers" else stack(layers, model.plan)
    batched = np.asarray(logits_of(model, params, PADDED, LENGTHS))
    assert np.isfinite(batched).all()
    for row, length in enumerate(LENGTHS):
      alone = logits_of(model, params, PADDED[row : row + 1, :length])
      np.testing.assert_allclose(batched[row, :length], alone[0], rtol=0, atol=1e-5)

  def test_padding_does_not_matter(self, model, layers):
    other = np.where(np.arange(12) < LENGTHS[:, None], PADDED, 3).astype(np.int32)
    assert (other != PADDED).any()
    first = np.asarray(logits_of(model, layers, PADDED, LENGTHS))
    second = np.asarray(logits_of(model, layers, other, LENGTHS))
    for row, length in enumerate(LENGTHS):
      np.testing.assert_array_equal(first[row, :length], second[row, :length])

  def test_with_a_cache(self, model, layers, unrolled):
    """Rows of unequal prompts are read, then continued a token at a time."""
    prompts = np.array([5, 3], np.int32)
    apply = jax.jit(model.apply, static_argnames="method")
    logits, cache = apply({"params": layers}, TOKENS[:, :5], prompts, method="prefill")
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 7), (0, 0))), cache)
    for step in range(8):
      at = prompts + step
      live = at <= TOKENS.shape[1]
      np.testing.assert_allclose(logits[live], unrolled[np.arange(2), at - 1][live], rtol=0, atol=1e-5)
      slots = np.minimum(at, TOKENS.shape[1] - 1)
      logits, cache = apply({"params": layers}, TOKENS[np.arange(2), slots], cache, slots, method="step")

  def test_prefill_and_step_make_the_same_cache(self, model, layers):
    apply = jax.jit(model.apply, static_argnames="method")
    full = np.array([4, 4], np.int32)
    _, read = apply({"params": layers}, TOKENS[:, :4], full, method="prefill")
    _, cache = apply({"params": layers}, TOKENS[:, :1], np.array([1, 1], np.int32), method="prefill")
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0))), cache)
    for slot in range(1, 4):
      at = np.full(2, slot, np.int32)
      _, cache = apply({"params": layers}, TOKENS[:, slot], cache, at, method="step")
    assert jax.tree.structure(cache) == jax.tree.structure(read)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(read), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

  @pytest.mark.parametrize("remat", ["full", "dots"])
  @pytest.mark.parametrize("state", STATES)
  def test_under_remat(self, state, remat):
    model = tiny.model(**SMALL, attention_state=state)
    params = stack(tiny.params(model), model.plan)
    value, gradient = loss_and_gradient(model, params, TOKENS)
    rematted = Transformer(dataclasses.replace(model.config, remat=remat), model.plan)
    again, gradient_again = loss_and_gradient(rematted, params, TOKENS)
    assert abs(float(value) - float(again)) <= 1e-5
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    # The comparison means something only if the second program does recompute.
    assert "optimization_barrier" in loss_and_gradient.lower(rematted, params, TOKENS).as_text() or (
      dots(rematted, params) > dots(model, params)
    )

  @pytest.mark.parametrize("state", STATES)
  def test_unrolled_gradient(self, state):
    model = tiny.model(**SMALL, attention_state=state)
    layers = tiny.params(model)
    value, gradient = loss_and_gradient(model, layers, TOKENS)
    scanned, gradient_scanned = loss_and_gradient(model, stack(layers, model.plan), TOKENS)
    assert abs(float(value) - float(scanned)) <= 1e-5
    gradient = stack(gradient, model.plan)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_scanned), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def dots(model, params) -> int:
  return loss_and_gradient.lower(model, params, TOKENS).as_text().count("stablehlo.dot_general")


def test_both_states_agree():
  first, second = (tiny.model(attention_state=state) for state in STATES)
  params = tiny.params(first)
  for tokens, lengths in ((TOKENS, None), (PADDED, LENGTHS)):
    seen = np.arange(12) < (np.full(len(tokens), 12) if lengths is None else lengths)[:, None]
    left, right = (np.asarray(logits_of(model, params, tokens, lengths)) for model in (first, second))
    np.testing.assert_allclose(left[seen], right[seen], rtol=0, atol=1e-5)


def test_sharing_changes_the_result():
  """The tests above would also pass if followers were ignored."""
  dense = tiny.model("dense")
  params = tiny.params(dense)
  shared = tiny.model()
  assert np.abs(logits_of(dense, params, TOKENS) - logits_of(shared, params, TOKENS)).max() > 0.01


def test_dense_plan_shares_nothing():
  model = tiny.model("dense", attention_state="attention_weights")
  states = jax.jit(functools.partial(model.apply, method="states"))({"params": tiny.params(model)}, TOKENS)
  weights = np.stack([state.weights() for state in states])
  assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(weights))


def test_blocks_are_traced_once(monkeypatch):
  """A loop inside a loop, each of which traces its body twice, takes four times as long to trace."""
  traced = []

  def watched(rest):
    def call(self, x, y, cached=False):
      traced.append(type(self))
      return rest(self, x, y, cached)

    return call

  for block in (AnchorBlock, FollowerBlock):
    monkeypatch.setattr(block, "rest", watched(block.rest))
  model = tiny.model("0:1-2,3:4-5", num_layers=7)
  params = tiny.params(model)
  traced.clear()
  jax.eval_shape(lambda params: model.apply({"params": params}, TOKENS), stack(params, model.plan))
  # A group of three twice, and a layer by itself.
  assert traced == [AnchorBlock, FollowerBlock, AnchorBlock]


@pytest.mark.parametrize(("state", "remat"), [("query_key", "none"), ("attention_weights", "full")])
def test_program_size_does_not_grow_with_depth(state, remat):
  def sizes(plan: str, depth: int) -> tuple[int, int]:
    model = tiny.model(plan, num_layers=depth, attention_state=state, remat=remat)
    assert len(model.plan.runs) == 3
    params, tokens = abstract_params(model), jax.ShapeDtypeStruct((2, 12), jnp.int32)
    return (
      len(logits_of.lower(model, params, tokens).as_text()),
      len(loss_and_gradient.lower(model, params, tokens).as_text()),
    )

  # Two groups of two layers between two stretches of dense ones; then eight of three.
  shallow = sizes("2:3,4:5", 8)
  deep = sizes(",".join(f"{a}:{a + 1}-{a + 2}" for a in range(4, 28, 3)), 32)
  assert all(large <= 1.3 * small for large, small in zip(deep, shallow, strict=True)), (deep, shallow)


def temporaries(length: int, **changes) -> int:
  model = tiny.model("0:1-3", num_layers=4, max_length=length, **changes)
  params, tokens = abstract_params(model), jax.ShapeDtypeStruct((1, length), jnp.int32)
  return loss_and_gradient.lower(model, params, tokens).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_length_and_not_its_square():
  short, long = (temporaries(T, attention="blockwise", attention_state="query_key") for T in (2048, 4096))
  assert long <= 2.2 * short, (short, long)


def test_memory_of_attention_weights_grows_with_the_square():
  """What the test above would measure if a weights tensor were kept anywhere."""
  short, long = (temporaries(T, attention_state="attention_weights") for T in (512, 1024))
  assert long >= 3 * short, (short, long)


@pytest.mark.parametrize("state", STATES)
def test_gradients_respect_causality(state):
  """d output[t] / d input[s] is exactly zero for s > t, and is not for s ≤ t."""
  model = tiny.model(**SMALL, attention_state=state)
  params = stack(tiny.params(model), model.plan)["runs"]
  x = np.random.default_rng(0).normal(size=(1, 6, 32)).astype(np.float32)

  def outputs(x):
    return Runs(model.config, model.plan).apply({"params": params}, x)[0].sum(axis=-1)

  jacobian = np.abs(jax.jit(jax.jacrev(outputs))(x)[:, 0]).sum(axis=-1)
  np.testing.assert_array_equal(jacobian > 0, np.tril(np.ones((6, 6), bool)))


@pytest.mark.parametrize("state", STATES)
def test_no_gradient_flows_into_padding(state):
  model = tiny.model(**SMALL, attention_state=state)
  params = stack(tiny.params(model), model.plan)["runs"]
  x = np.random.default_rng(0).normal(size=(2, 6, 32)).astype(np.float32)
  lengths = np.array([4, 6], np.int32)

  def total(x):
    y = Runs(model.config, model.plan).apply({"params": params}, x, ops.Rows(lengths))
    return jnp.where((np.arange(6) < lengths[:, None])[:, :, None], y, 0.0).sum()

  gradient = np.abs(jax.jit(jax.grad(total))(x)).sum(axis=-1)
  np.testing.assert_array_equal(gradient > 0, np.arange(6) < lengths[:, None])


@pytest.mark.parametrize("layout", ["runs", "layers"])
def test_every_parameter_names_its_axes(layout):
  known = {"embed", "vector", "heads", "kv_heads", "head_dim", "mlp", "vocab", "groups", "followers"}
  boxes, _ = jax.tree.flatten(
    abstract_params(tiny.model(), layout=layout, boxed=True), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
  )
  for box in boxes:
    assert isinstance(box, nn.LogicallyPartitioned)
    assert len(box.names) == len(box.value.shape)
    assert set(box.names) <= known


def test_names_of_axes():
  params = abstract_params(tiny.model(), boxed=True)
  run = params["runs"]["1"]
  assert params["embed"]["embedding"].names == ("vocab", "embed")
  assert params["lm_head"]["kernel"].names == ("embed", "vocab")
  assert run["anchor"]["attention"]["q_proj"]["kernel"].names == ("groups", "embed", "heads", "head_dim")
  assert run["anchor"]["attention"]["k_proj"]["kernel"].names == ("groups", "embed", "kv_heads", "head_dim")
  assert run["followers"]["attention"]["o_proj"]["kernel"].names == (
    "groups",
    "followers",
    "heads",
    "head_dim",
    "embed",
  )
  assert run["followers"]["mlp"]["down_proj"]["kernel"].names == ("groups", "followers", "mlp", "embed")
  assert run["followers"]["mlp_norm"]["scale"].names == ("groups", "followers", "vector")


def test_init_makes_the_run_layout():
  model = tiny.model("0:1,2:3", num_layers=4, tie_embeddings=True)
  made = nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS)["params"])
  followers = made["runs"]["0"]["followers"]
  assert set(made) == {"embed", "runs", "final_norm"}
  assert set(followers["attention"]) == {"v_proj", "o_proj"}
  kernels = followers["mlp"]["up_proj"]["kernel"]
  assert kernels.shape == (2, 1, 32, 48)
  # Layers of one run start from different weights, of variance 1 / fan-in.
  assert np.abs(kernels[0] - kernels[1]).max() > 0.01
  assert float(jnp.square(kernels).sum(axis=2).mean()) == pytest.approx(1.0, rel=0.1)


def test_bfloat16():
  """Computed in bfloat16 throughout, up to float32 logits."""
  exact, rough = tiny.model(), tiny.model(dtype="bfloat16", param_dtype="bfloat16")
  params = tiny.params(exact)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  logits = logits_of(rough, rounded, TOKENS)
  assert logits.dtype == jnp.float32
  wanted = np.asarray(logits_of(exact, params, TOKENS))
  # Eight bits of mantissa, through seven layers.
  assert np.abs(logits - wanted).mean() < 0.02 * np.abs(wanted).mean() + 0.02


class TestErrors:
  def test_plan_of_another_depth(self):
    with pytest.raises(ValueError, match="the plan is for 3 layers, the model has 7"):
      Transformer(tiny.config(), SharingPlan.dense(3))

  @pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
      ([[1, 61]], None, "token 61 is outside the vocabulary of 61, 0 to 60"),
      ([[1, -1]], None, "token -1 is outside the vocabulary of 61, 0 to 60"),
      ([1, 2], None, r"tokens must be integers of shape \[batch, length\]"),
      ([[1.0, 2.0]], None, "tokens must be integers"),
      ([[1, 2]], [3], "a length of 3 does not fit rows of 2 tokens"),
      ([[1, 2]], [0], "a length of 0 does not fit rows of 2 tokens"),
      ([[1, 2]], [1, 2], "lengths must be integers of shape"),
    ],
  )
  def test_bad_batches(self, tokens, lengths, message):
    model = tiny.model()
    tokens = np.asarray(tokens)
    tokens = tokens.astype(np.int32) if tokens.dtype.kind == "i" else tokens
    lengths = None if lengths is None else np.asarray(lengths, np.int32)
    with pytest.raises(ValueError, match=message):
      model.apply({"params": tiny.params(model)}, tokens, lengths)

  @pytest.mark.parametrize(
    ("given", "message"),
    [
      (
        ([[1, 2]],),
        "tokens must be integers of shape [batch, length], not a Python list (convert it with np.asarray)",
      ),
      ((TOKENS, [3, 4]), "lengths must be integers of shape (2,), not a Python list"),
      ((TOKENS, None, [[0, 0]]), "segments must be integers of shape (2, 12), not a Python list"),
    ],
  )
  def test_lists_are_no_arrays(self, given, message):
    model = tiny.model()
    with pytest.raises(UserError) as raised:
      model.apply({"params": tiny.params(model)}, *given)
    assert str(raised.value).startswith(message)

  def test_token_outside_the_vocabulary_inside_jit_gives_nan(self):
    """Values are not known there, and another token's vector would be a silent wrong answer."""
    model = tiny.model()
    tokens = np.array([[1, 2, 61, 3], [1, -1, 4, 3], [1, 2, 4, 3]], np.int32)
    logits = np.asarray(logits_of(model, tiny.params(model), tokens))
    assert np.isnan(logits[:2]).all()
    assert np.isfinite(logits[2]).all()

  def test_batch_closed_over_by_jit_is_checked(self):
    model = tiny.model()
    params, tokens = tiny.params(model), jnp.array([[1, 99]], jnp.int32)
    with pytest.raises(ValueError, match="token 99 is outside the vocabulary"):
      jax.jit(lambda params: model.apply({"params": params}, tokens))(params)

  def test_plan_string(self):
    with pytest.raises(UserError, match=r"a model's plan is a SharingPlan, not '1:2': SharingPlan.parse reads a plan"):
      Transformer(tiny.model().config, "1:2")
