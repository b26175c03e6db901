"""Our modules in other people's training loops: nnx and its optimiser, Flax's TrainState, Orbax, a mesh."""

import equinox
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sa_jax
from sa_jax import ops
from sa_jax.sharding import make_mesh, on_mesh, param_shardings
from tests import tiny

PLAN = "0:1-2"
RATE = 0.1


@pytest.fixture(scope="module")
def model():
  return tiny.model(PLAN, num_layers=3, vocab_size=64)


@pytest.fixture(scope="module")
def params(model):
  return jax.tree.map(jnp.asarray, tiny.params(model, "runs"))


def batch(seed):
  return tiny.tokens(4, 6, 64, seed)


def loss_of(model, params, tokens):
  logits = model.apply({"params": params}, tokens)
  return -ops.token_log_likelihoods(logits[:, :-1], jnp.asarray(tokens[:, 1:])).mean()


@pytest.fixture(scope="module")
def stepped(model, params):
  """Two steps of gradient descent, by hand: the parameters, and the losses before each."""
  gradient = jax.jit(jax.value_and_grad(lambda params, tokens: loss_of(model, params, tokens)))
  losses, found = [], params
  for seed in range(2):
    loss, by = gradient(found, batch(seed))
    losses.append(float(loss))
    found = jax.tree.map(lambda x, d: x - RATE * d, found, by)
  return found, losses


def assert_close(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_nnx_optimizer_save_and_load(model, params, stepped, tmp_path):
  bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), batch(0))
  nnx.update(bridged, jax.tree.map(nnx.Param, params))
  optimizer = nnx.Optimizer(bridged, optax.sgd(RATE), wrt=nnx.Param)

  @nnx.jit
  def step(bridged, optimizer, tokens):
    def loss(bridged):
      return -ops.token_log_likelihoods(bridged(tokens)[:, :-1], tokens[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(bridged)
    optimizer.update(bridged, gradient)
    return value

  losses = [float(step(bridged, optimizer, jnp.asarray(batch(seed)))) for seed in range(2)]
  np.testing.assert_allclose(losses, stepped[1], rtol=1e-5)
  trained = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
  assert_close(trained, stepped[0])

  sa_jax.save(tmp_path / "saved", model, trained)
  again, loaded = sa_jax.load(tmp_path / "saved")
  assert again.plan == model.plan
  fresh = nnx.bridge.lazy_init(nnx.bridge.ToNNX(again, rngs=nnx.Rngs(1)), batch(0))
  nnx.update(fresh, jax.tree.map(nnx.Param, loaded))
  np.testing.assert_array_equal(fresh(batch(3)), bridged(batch(3)))


def test_train_state_multi_steps_and_checkpoint_manager(model, params, tmp_path):
  """Two small batches are one large one; and a state that is written is read again, to the bit."""
  gradient = jax.jit(jax.grad(lambda params, tokens: loss_of(model, params, tokens)))
  state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.MultiSteps(optax.sgd(RATE), 2))
  with jax.numpy_dtype_promotion("standard"):
    for part in np.split(batch(0), 2):
      state = state.apply_gradients(grads=gradient(state.params, part))
  wanted = jax.tree.map(lambda x, d: x - RATE * d, params, gradient(params, batch(0)))
  assert_close(state.params, wanted)
  with ocp.CheckpointManager(tmp_path / "run", options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
    manager.save(2, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    again = manager.restore(2, args=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)))
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_loop_on_a_mesh_compiles_once(model, params, stepped, caplog):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  optimizer = optax.sgd(RATE)

  @jax.jit
  def step(params, state, tokens):
    loss, gradient = jax.value_and_grad(lambda params: loss_of(model, params, tokens))(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss

  with on_mesh(mesh), jax.log_compiles():
    shardings = param_shardings(model, mesh)
    placed = jax.device_put(params, shardings)
    state, losses = optimizer.init(placed), []
    for seed in range(2):
      placed, state, loss = step(placed, state, jnp.asarray(batch(seed)))
      losses.append(float(loss))
  compiled = [record for record in caplog.messages if record.startswith("Finished XLA compilation of jit(step)")]
  assert len(compiled) == 1
  np.testing.assert_allclose(losses, stepped[1], rtol=1e-5)
  assert_close(jax.device_get(placed), stepped[0])
  for leaf, where in zip(*map(jax.tree.leaves, (placed, shardings)), strict=True):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


class Pair(nnx.Module):
  """An anchor and its follower, native in nnx and made of `ops` alone."""

  def __init__(self, width: int, heads: int, head_dim: int, *, rngs: nnx.Rngs):
    into = lambda: nnx.LinearGeneral(width, (heads, head_dim), use_bias=False, rngs=rngs)
    out = lambda: nnx.LinearGeneral((heads, head_dim), width, axis=(-2, -1), use_bias=False, rngs=rngs)
    self.q, self.k, self.v, self.o = into(), into(), into(), out()
    self.follower_v, self.follower_o = into(), out()
    self.frequencies = nnx.static(tuple(ops.rope_frequencies(ops.RopeConfig(), head_dim, 0).tolist()))

  def __call__(self, x: jax.Array) -> jax.Array:
    turn = lambda each: ops.apply_rope(each, jnp.arange(x.shape[1]), np.asarray(self.frequencies, np.float32))
    state = sa_jax.nn.QueryKey(turn(self.q(x)), turn(self.k(x)))
    x = x + self.o(state.attend(self.v(x)))
    return x + self.follower_o(state.attend(self.follower_v(x)))


def test_a_native_nnx_pair_is_ours(model):
  """The same parameters in our linen modules, which have queries and keys in the anchor alone."""
  config = tiny.config(num_kv_heads=4)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 32)), jnp.float32)
  pair = Pair(32, 4, 8, rngs=nnx.Rngs(0))
  kernel = lambda layer: {"kernel": layer.kernel[...]}
  anchor = {"q_proj": kernel(pair.q), "k_proj": kernel(pair.k), "v_proj": kernel(pair.v), "o_proj": kernel(pair.o)}
  follower = {"v_proj": kernel(pair.follower_v), "o_proj": kernel(pair.follower_o)}
  y, state = sa_jax.nn.AnchorAttention(config).apply({"params": anchor}, x)
  wanted = x + y
  wanted = wanted + sa_jax.nn.FollowerAttention(config).apply({"params": follower}, wanted, state)
  np.testing.assert_allclose(nnx.jit(lambda pair, x: pair(x))(pair, x), wanted, atol=1e-5)
  gradient = nnx.grad(lambda pair: pair(x).sum())(pair)
  assert float(jnp.abs(gradient["q"].kernel[...]).max()) > 0


class Shared(equinox.Module):
  """An anchor and its follower, each added to x, as Equinox's modules."""

  q: jax.Array
  k: jax.Array
  v: tuple[jax.Array, jax.Array]
  o: tuple[jax.Array, jax.Array]

  def __call__(self, x):
    into = lambda w: jnp.einsum("BTD,DNH->BTNH", x, w)
    state = sa_jax.nn.QueryKey(into(self.q), into(self.k))
    for v, o in zip(self.v, self.o, strict=True):
      x = x + jnp.einsum("BTNH,NHD->BTD", state.attend(jnp.einsum("BTD,DNH->BTNH", x, v)), o)
    return x


def test_an_equinox_pair_is_ours_and_learns_as_ours_does():
  config = tiny.config(num_kv_heads=4, rope=None)
  random = np.random.default_rng(0)
  x, *weights = (
    jnp.asarray(random.normal(size=shape), jnp.float32) for shape in [(2, 9, 32), *[(32, 4, 8)] * 4, *[(4, 8, 32)] * 2]
  )
  pair = Shared(*weights[:2], tuple(weights[2:4]), tuple(weights[4:]))

  def ours(pair):
    kernels = lambda **named: {f"{name}_proj": {"kernel": kernel} for name, kernel in named.items()}
    anchor = kernels(q=pair.q, k=pair.k, v=pair.v[0], o=pair.o[0])
    y, state = sa_jax.nn.AnchorAttention(config).apply({"params": anchor}, x)
    follower = {"params": kernels(v=pair.v[1], o=pair.o[1])}
    return x + y + sa_jax.nn.FollowerAttention(config).apply(follower, x + y, state)

  def learnt(call):
    return equinox.filter_jit(equinox.filter_value_and_grad(lambda pair: (call(pair) ** 2).mean()))(pair)

  for found, wanted in zip(jax.tree.leaves(learnt(lambda pair: pair(x))), jax.tree.leaves(learnt(ours)), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_boxes_of_linen_are_taken_as_they_are(model):
  """What ``init`` returns, logical axes around each array, goes in and out without unboxing."""
  boxed = jax.jit(model.init)(jax.random.key(0), batch(0))
  np.testing.assert_allclose(model.apply(boxed, batch(1)), model.apply(linen.unbox(boxed), batch(1)), atol=1e-6)
