"""The GPU kernels of decoding, interpreted on the CPU, against plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from sa_jax import ops
from sa_jax.ops import kernels
from sa_jax.ops.attention import decode, flash_decode, hopper_decode
from sa_jax.ops.attention.flash_decode import How
from tests import tiny

MODULES = {"triton": flash_decode, "mosaic": hopper_decode}


@pytest.fixture(params=MODULES)
def attention(request):
  """Each implementation of attention's kernels, as far as it can run here."""
  if request.param == "mosaic" and not hopper_decode.CAN_INTERPRET and not kernels.is_hopper():
    pytest.skip("this JAX has no interpreter of Mosaic GPU that takes these kernels")
  return MODULES[request.param]


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (2, 2), (24, 1)])
def test_flash_decode_equals_its_parts(attention, heads, kv_heads):
  """Rows that end in the first slot, inside a block, on a block's border and in the last slot, and a follower's."""
  slots, head_dim = 256, 32
  positions = jnp.asarray([0, 70, 128, slots - 1], jnp.int32)
  cached = (4, kv_heads, slots, head_dim)
  q, key, value, keys, values = arrays(0, (4, heads, head_dim), *[(4, kv_heads, head_dim)] * 2, cached, cached)
  attend = functools.partial(attention.attend, q, (key, value), (keys, values), ops.Rows(offset=positions))
  out, weights, (new_keys, new_values) = attend(How(head_dim**-0.5, with_weights=True), interpret=True)
  alone, nothing, _ = attend(How(head_dim**-0.5), interpret=True)
  np.testing.assert_array_equal(alone, out)
  assert nothing is None
  followed, followed_values = attention.follow(weights, 2 * value, 2 * values, positions, interpret=True)
  written = [np.array(keys), np.array(values)]
  for row, position in enumerate(positions.tolist()):
    written[0][row, :, position], written[1][row, :, position] = key[row], value[row]
  np.testing.assert_array_equal(new_keys, written[0])
  np.testing.assert_array_equal(new_values, written[1])
  np.testing.assert_array_equal(followed_values, 2 * written[1])
  for row, position in enumerate(positions.tolist()):
    for head in range(heads):
      k, v = (each[row, head // (heads // kv_heads), : position + 1].astype(np.float64) for each in written)
      scores = k @ np.asarray(q[row, head], np.float64) / head_dim**0.5
      expected = np.exp(scores - scores.max())
      expected /= expected.sum()
      np.testing.assert_allclose(weights[row, head, : position + 1], expected, atol=1e-6)
      assert (weights[row, head, position + 1 :] == 0).all()
      np.testing.assert_allclose(out[row, head], expected @ v, atol=2e-6)
      np.testing.assert_allclose(followed[row, head], 2 * expected @ v, atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_flash_decode_of_a_quantised_cache_is_that_of_the_vectors_it_stands_for(attention, cache_dtype):
  """Over several splits, and a new token that is rounded as it is stored."""
  if attention is hopper_decode and cache_dtype == "int4":
    pytest.skip("not of int4")
  store = ops.FORMATS[cache_dtype].store
  slots, head_dim, positions = 256, 32, jnp.asarray([5, 200], jnp.int32)
  q, key, value, keys, values = arrays(5, (2, 4, head_dim), *[(2, 2, head_dim)] * 2, *[(2, 2, slots, head_dim)] * 2)
  stored = store(keys), store(values * 3)
  rows, how = ops.Rows(offset=positions), How(0.2, with_weights=True)
  out, weights, written = attention.attend(q, (key, value), stored, rows, how, interpret=True)
  expected = [ops.write_slot(each, new, positions) for each, new in zip(stored, (key, value), strict=True)]
  jax.tree.map(np.testing.assert_array_equal, list(written), expected)
  followed, new_values = attention.follow(weights, value, stored[1], positions, interpret=True)
  np.testing.assert_allclose(followed, out, atol=5e-6)
  jax.tree.map(np.testing.assert_array_equal, new_values, expected[1])
  k, v = (np.asarray(each.numbers(), np.float64) * np.asarray(each.scale, np.float64) for each in expected)
  for row, position in enumerate(positions.tolist()):
    for head in range(4):
      scores = 0.2 * k[row, head // 2, : position + 1] @ np.asarray(q[row, head], np.float64)
      weights = np.exp(scores - scores.max())
      np.testing.assert_allclose(out[row, head], weights @ v[row, head // 2, : position + 1] / weights.sum(), atol=5e-6)


@pytest.mark.parametrize(("size", "sinks"), [(64, False), (128, True)])
def test_pages_are_rows_whose_parts_lie_apart(attention, size, sinks):
  """Of a kernel and of plain JAX, beside rows in one piece: pages that are full, begun and still empty, and strays."""
  most, head_dim, offset = 3, 32, jnp.asarray([size - 1, 2 * size + 2, 5], jnp.int32)
  q, key, value, keys, values = arrays(
    7, (3, 4, head_dim), *[(3, 2, head_dim)] * 2, *[(3, 2, size * most, head_dim)] * 2
  )
  table = np.array([[4, 6, 8], [0, 5, 2], [3, 8, 8]])
  owners, firsts = np.array([1, -1, 1, 2, 0, 1, 0, -1]), size * np.array([0, 0, 2, 0, 0, 1, 1, 0])
  pages = ops.Pages(*(jnp.asarray(x, jnp.int32) for x in (table, owners, firsts)))

  def paged(x):
    parts = np.full((len(owners), 2, size, head_dim), np.nan, np.float32)  # of no row: never seen
    for page, (owner, first) in enumerate(zip(owners, firsts)):
      if owner >= 0:
        parts[page] = x[owner, :, first : first + size]
    return jnp.asarray(parts)

  rows = ops.Rows(offset=offset, sinks=arrays(8, (4,))[0] if sinks else None)
  how, new = How(head_dim**-0.5, with_weights=True), (key, value)
  out, weights, whole = attention.attend(q, new, (keys, values), rows, how, interpret=True)
  followed, _ = attention.follow(weights, 2 * value, 2 * values, offset, interpret=True)
  rows, cached = dataclasses.replace(rows, pages=pages), (paged(keys), paged(values))
  found, shares, written = attention.attend(q, new, cached, rows, how, interpret=True)
  plain, plain_shares, plain_written = decode.decode_attend(
    q[:, None], (key[:, None], value[:, None]), cached, rows, with_weights=True
  )
  for each in (written, plain_written):
    jax.tree.map(np.testing.assert_array_equal, each, tuple(map(paged, whole)))
  np.testing.assert_allclose(found, out, atol=2e-6)
  np.testing.assert_allclose(plain[:, 0], out, atol=2e-6)
  doubled = 2 * paged(values)
  for each in (
    attention.follow(shares, 2 * value, doubled, offset, pages, interpret=True)[0],
    decode.decode_follow(plain_shares, 2 * value[:, None], doubled, offset, pages)[0][:, 0],
  ):
    np.testing.assert_allclose(each, followed, atol=4e-6)


def test_flash_decode_reads_nothing_past_the_end(attention):
  """Slots after a row's token may hold anything, NaN included, where no block before it holds them too."""
  keys, values = (jnp.full((1, 1, 128, 32), jnp.nan).at[:, :, :64].set(1.0) for _ in range(2))
  q, key, value = arrays(1, (1, 2, 32), (1, 1, 32), (1, 1, 32))
  rows, how = ops.Rows(offset=jnp.asarray([63])), How(0.25, with_weights=True)
  out, weights, (_, values) = attention.attend(q, (key, value), (keys, values), rows, how, interpret=True)
  followed, _ = attention.follow(weights, value, values, jnp.asarray([63]), interpret=True)
  assert all(np.isfinite(each).all() for each in (out, weights, followed))


@pytest.mark.parametrize(
  ("rows", "slots", "split"),
  [(128, 4096, 2048), (512, 4096, 2048), (8, 1024, 64), (32, 1024, 256), (1, 192, 64)],
)
def test_splits_are_enough_and_divide_the_cache(rows, slots, split):
  assert flash_decode.choose_split(rows, slots, programs=99, longest=2048) == split
  assert slots % split == 0


@pytest.mark.parametrize("batch", [1, 5, 16, 20])
def test_gated_linear_equals_its_formula(batch):
  x, gate, up = arrays(2, (batch, 128), (128, 192), (128, 192))
  x64, gate64, up64 = (np.asarray(each, np.float64) for each in (x, gate, up))
  linear = x64 @ gate64
  expected = linear / (1 + np.exp(-linear)) * (x64 @ up64)
  np.testing.assert_allclose(ops.gated_linear(x, gate, up, interpret=True), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("batch", [1, 5, 20])
def test_linears_are_products_of_any_widths(batch):
  x, *weights = arrays(4, (batch, 128), (128, 192), (128, 64), (128, 128))
  found = ops.linears(x, weights, interpret=True)
  assert [y.shape for y in found] == [(batch, 192), (batch, 64), (batch, 128)]
  for y, weight in zip(found, weights, strict=True):
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(weight, np.float64), rtol=1e-4, atol=2e-4)


def half(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
  return [x.astype(jnp.bfloat16) for x in arrays(seed, *shapes)]


def close(found: jax.Array, expected: jax.Array, atol: float) -> None:
  np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.01, atol=atol)


@pytest.mark.slow
class TestOnTheDevice:
  """In half precision, as a model calls the kernels: compiled where there is a GPU, against plain JAX there."""

  interpret = jax.default_backend() == "cpu"

  @pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"])
  @pytest.mark.parametrize(("kv_heads", "head_dim"), [(8, 64), (2, 128)])
  def test_flash_decode(self, attention, kv_heads, head_dim, cache_dtype):
    if attention is hopper_decode and (cache_dtype, head_dim) not in [(None, 64), (None, 128), ("int8", 128)]:
      pytest.skip("not of int4, nor of int8 in narrow heads")
    positions = jnp.asarray([3, 300], jnp.int32)
    token, cached = (2, kv_heads, head_dim), (2, kv_heads, 512, head_dim)
    q, key, value, keys, values = half(6, (2, 8, head_dim), token, token, cached, cached)
    if cache_dtype is not None:
      keys, values = map(ops.FORMATS[cache_dtype].store, (keys, values))
    rows, how = ops.Rows(offset=positions), How(0.1, with_weights=True)
    out, weights, written = attention.attend(q, (key, value), (keys, values), rows, how, self.interpret)
    expected = [ops.write_slot(each, new, positions) for each, new in ((keys, key), (values, value))]
    jax.tree.map(np.testing.assert_array_equal, list(written), expected)
    plain = ops.decode_weights(q[:, None], expected[0], ops.Rows(offset=positions), ops.AttentionSpec(scale=0.1))
    close(weights, plain[:, :, 0], 0.002)
    close(out, ops.decode_apply(plain, expected[1])[:, 0], 0.01)
    # The follower has other values, which this token's joins too.
    others = jax.tree.map(jnp.flip, values)
    followed, new_others = attention.follow(weights, key, others, positions, interpret=self.interpret)
    expected_others = ops.write_slot(others, key, positions)
    jax.tree.map(np.testing.assert_array_equal, new_others, expected_others)
    close(followed, ops.decode_apply(weights[:, :, None], expected_others)[:, 0], 0.01)

  def test_products(self):
    x, gate, up = half(7, (5, 128), (128, 192), (128, 192))
    x *= jnp.asarray(0.1, x.dtype)
    x32, gate32, up32 = (each.astype(jnp.float32) for each in (x, gate, up))
    with jax.default_matmul_precision("highest"):
      product, other = x32 @ gate32, x32 @ up32
    found = ops.linears(x, [gate, up], interpret=self.interpret)
    close(found[0], product, 0.01)
    close(found[1], other, 0.01)
    close(ops.gated_linear(x, gate, up, interpret=self.interpret), jax.nn.silu(product) * other, 0.01)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
  ("module", "cache_dtype"),
  [*((flash_decode, kind) for kind in (None, *ops.FORMATS)), (hopper_decode, None), (hopper_decode, "int8")],
)
def test_kernels_are_lowered_for_a_gpu_where_there_is_none(module, cache_dtype):
  """To Triton's or Mosaic's own language, some with values of half the keys' width; caches are written in place."""
  if module is flash_decode and kernels.triton is None:
    pytest.skip("this JAX has no Triton")
  wide = 64 if cache_dtype is None else 128
  shapes = (2, 8, 128), (2, 2, 128), (2, 2, wide), (2, 2, 512, 128), (2, 2, 512, wide)

  def both(q, key, value, keys, values):
    if cache_dtype is not None:
      keys, values = map(ops.FORMATS[cache_dtype].store, (keys, values))
    positions, how = jnp.asarray([3, 300], jnp.int32), How(0.1, with_weights=True)
    rows = ops.Rows(offset=positions)
    out, weights, (_, values) = module.attend(q, (key, value), (keys, values), rows, how)
    return out, module.follow(weights, value, values, positions)[0]

  card = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
    traced = jax.jit(both).trace(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  if module is flash_decode:
    assert ("flash_decode" in text, "flash_follow" in text) == (True, True)
  else:
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
  if cache_dtype is None:
    assert text.count("output_operand_alias<") == 3


def test_kernels_are_not_for_this_device():
  """On the CPU decoding takes the plain path: float32, and no interpreter."""
  (x,) = arrays(3, (1, 64))
  assert not ops.has_linear_kernels(x.astype(jnp.bfloat16), jnp.zeros((64, 64), jnp.bfloat16))


@pytest.mark.parametrize(
  ("tokens", "dtype", "stored", "takes"),
  [
    (1, "bfloat16", ("bfloat16", 128, 64), True),
    (1, "float16", ("int8", 64, 64), True),
    (1, "bfloat16", ("int4", 32, 64), True),
    (1, "bfloat16", ("int4", 16, 64), False),  # halves that are too narrow for a product
    (2, "bfloat16", ("bfloat16", 128, 64), False),  # several tokens a row
    (1, "float32", ("float32", 128, 64), False),
    (1, "bfloat16", ("float16", 128, 64), False),
    (1, "bfloat16", ("bfloat16", 96, 64), False),  # a head that is no power of two
    (1, "bfloat16", ("bfloat16", 128, 96), False),  # slots that are no whole blocks
  ],
)
def test_what_attention_s_kernels_take(monkeypatch, tokens, dtype, stored, takes):
  monkeypatch.setattr(decode, "has_gpu_kernels", lambda _: True)
  kind, head_dim, slots = stored
  form = ops.FORMATS.get(kind)
  cache = jnp.zeros((2, 1, slots, head_dim), kind if form is None else "float32")
  cache = cache if form is None else form.store(cache)
  assert decode.which_kernels(tokens, jnp.dtype(dtype), cache) == ("flash_decode" if takes else None)


@pytest.mark.parametrize(
  ("triton", "hopper", "preferred", "stored", "which"),
  [
    (True, True, "flash_decode", ("bfloat16", 128), "flash_decode"),
    (True, True, "hopper_decode", ("bfloat16", 128), "hopper_decode"),
    (True, False, "hopper_decode", ("bfloat16", 128), "flash_decode"),
    (True, True, "hopper_decode", ("bfloat16", 32), "flash_decode"),  # heads narrower than a product
    (True, True, "hopper_decode", ("int8", 128), "hopper_decode"),
    (True, True, "hopper_decode", ("int4", 128), "flash_decode"),
    (False, True, "flash_decode", ("bfloat16", 64), "hopper_decode"),  # a JAX without Triton
    (False, True, "flash_decode", ("int8", 64), None),
    (False, False, "flash_decode", ("bfloat16", 64), None),
  ],
)
def test_which_kernels_run(monkeypatch, triton, hopper, preferred, stored, which):
  """Triton's while JAX has it and nobody prefers Hopper's own, of what they take."""
  monkeypatch.setattr(decode, "has_gpu_kernels", lambda _: triton)
  monkeypatch.setattr(decode, "is_hopper", lambda: hopper)
  monkeypatch.setattr(decode, "PREFERRED", preferred)
  kind, head_dim = stored
  cache = jnp.zeros((2, 1, 64, head_dim), "bfloat16")
  cache = ops.FORMATS[kind].store(cache) if kind in ops.FORMATS else cache
  assert decode.which_kernels(1, jnp.dtype("bfloat16"), cache) == which
  assert decode.which_kernels(1, jnp.dtype("bfloat16"), cache, jnp.zeros((2, 1, 64, 48), "bfloat16")) is None


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"])
def test_a_model_that_decodes_with_the_kernels_is_the_same_model(monkeypatch, attention, cache_dtype):
  """A step against a cache, with all kernels interpreted: an anchor alone, and an anchor with a follower."""
  if attention is hopper_decode and cache_dtype == "int4":
    pytest.skip("not of int4")
  shapes = dict(embed_dim=64, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=64)
  model = tiny.model("1:2", num_layers=3, max_length=64, cache_dtype=cache_dtype, **shapes)
  params = jax.tree.map(jnp.asarray, tiny.params(model))
  tokens = tiny.tokens(2, 10)
  _, cache = model.apply({"params": params}, tokens, jnp.asarray([10, 7]), method="prefill")
  cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 54), (0, 0))), cache)
  arguments = tokens[:, 0], cache, jnp.asarray([10, 7])
  step = lambda: jax.jit(lambda params, *rest: model.apply({"params": params}, *rest, method="step"))(
    params, *arguments
  )
  expected, expected_cache = step()
  used = dict.fromkeys(("linears", "gated_linear", "attend", "follow"), 0)

  def counted(name, kernel):
    def call(*arguments, **options):
      used[name] += 1
      return kernel(*arguments, **options, interpret=True)

    return call

  monkeypatch.setattr(ops, "has_linear_kernels", lambda *_: True)
  monkeypatch.setattr(ops, "linears", counted("linears", ops.linears))
  monkeypatch.setattr(ops, "gated_linear", counted("gated_linear", ops.gated_linear))
  monkeypatch.setattr(decode, "which_kernels", lambda *_: attention.__name__.rpartition(".")[2])
  monkeypatch.setattr(attention, "attend", counted("attend", attention.attend))
  monkeypatch.setattr(attention, "follow", counted("follow", attention.follow))
  logits, new_cache = step()
  assert used == {"linears": 2, "gated_linear": 3, "attend": 2, "follow": 1}
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), new_cache, expected_cache)
