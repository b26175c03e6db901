"""Generation: the token loop against one forward pass a token, ends, padding, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import Transformer, decode, stack
from sa_jax.decode import (
  DecodeState,
  Engine,
  Prompts,
  Sampler,
  Settings,
  capacity_for,
  right_pad,
  room,
  stream,
  to_right_padded,
)
from sa_jax.nn import Cache
from tests import tiny

NEW = 6
PROMPTS = [[5, 9, 3, 7], [11, 2], [40, 41, 42]]


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1,2:3", num_layers=4)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def batch():
  return right_pad(PROMPTS)


@pytest.fixture(scope="module")
def greedy(model, params, batch):
  return sa_jax.generate(model, params, *batch, max_new_tokens=NEW)


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model, params, tokens, lengths):
  return model.apply({"params": params}, tokens, lengths)


def without_a_cache(model, params, prompts, new: int) -> np.ndarray:
  """Greedy tokens by one whole forward pass a token."""
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max() + new), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  rows = np.arange(len(prompts))
  for _ in range(new):
    tokens[rows, lengths] = np.asarray(logits_of(model, params, tokens, lengths))[rows, lengths - 1].argmax(axis=-1)
    lengths = lengths + 1
  return np.stack([tokens[row, len(prompt) : len(prompt) + new] for row, prompt in enumerate(prompts)])


def test_a_stream_names_what_is_wrong(model, params):
  with pytest.raises(ValueError, match=r"max_new_tokens=0 \(must be at least 1\)"):
    list(stream(model, params, [1], Settings(0)))
  with pytest.raises(sa_jax.UserError, match=r"how must be Settings, .* not 4"):
    next(stream(model, params, [1], 4))
  with pytest.raises(ValueError, match="a prompt must be a flat list of at least one token"):
    list(stream(model, params, [], Settings(1)))
  with pytest.raises(sa_jax.UserError, match="a prompt must be a flat list of tokens"):
    list(stream(model, params, [[1], [2, 3]], Settings(1)))


def test_caches_have_slots_that_kernels_can_split():
  sizes = {1: 64, 64: 64, 65: 128, 2048: 2048, 2049: 2176, 4160: 4352, 8192: 8192}
  assert {size: capacity_for(size) for size in sizes} == sizes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_what_generate_gives_the_prompt_alone(model, params, temperature):
  parts = list(stream(model, params, PROMPTS[0], Settings(NEW, Sampler(temperature), seed=3), chunk=2))
  out = sa_jax.generate(model, params, np.array([PROMPTS[0]]), None, NEW, temperature, seed=3)
  assert [token for part in parts for token in part] == out.tokens[0].tolist()
  assert [len(part) for part in parts] == [1, 2, 2, 1]  # the first as soon as it is there


def test_greedy_equals_forward_passes(model, params, greedy):
  wanted = without_a_cache(model, params, PROMPTS, NEW)
  assert greedy.tokens.dtype == np.int32
  np.testing.assert_array_equal(greedy.tokens, wanted)
  assert greedy.lengths.tolist() == [NEW] * 3
  # A loop that always repeats one token would be no test.
  assert len(np.unique(wanted)) > 4


def test_ragged_equals_alone(model, params, greedy):
  for row in (1, 2):
    alone = sa_jax.generate(model, params, np.array([PROMPTS[row]]), max_new_tokens=NEW)
    np.testing.assert_array_equal(alone.tokens[0], greedy.tokens[row])


def test_left_padding(model, params, greedy):
  width = 4
  tokens = np.array([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
  mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
  out = sa_jax.generate(model, params, tokens, attention_mask=mask, max_new_tokens=NEW)
  np.testing.assert_array_equal(out.tokens, greedy.tokens)


def test_run_layout_and_a_larger_cache(model, params, batch, greedy):
  out = sa_jax.generate(model, stack(params, model.plan), *batch, max_new_tokens=NEW, cache_length=16)
  np.testing.assert_array_equal(out.tokens, greedy.tokens)


def test_one_new_token(model, params, batch, greedy):
  out = sa_jax.generate(model, params, *batch, max_new_tokens=1)
  np.testing.assert_array_equal(out.tokens, greedy.tokens[:, :1])


@pytest.mark.parametrize("pad", [None, 60])
def test_end_token(model, params, batch, greedy, pad):
  """A row stops at its end token, which counts; padding follows; the other rows go on as before."""
  stop = int(greedy.tokens[0, 2])
  config = dataclasses.replace(model.config, eos_token_ids=(stop, 59), pad_token_id=pad)
  out = sa_jax.generate(Transformer(config, model.plan), params, *batch, max_new_tokens=NEW)
  filler = stop if pad is None else pad
  for row, wanted in enumerate(greedy.tokens):
    ends = np.flatnonzero(np.isin(wanted, (stop, 59)))
    length = int(ends[0]) + 1 if len(ends) else NEW
    assert out.lengths[row] == length
    np.testing.assert_array_equal(out.tokens[row, :length], wanted[:length])
    assert (out.tokens[row, length:] == filler).all()
  assert out.lengths[0] <= 3
  assert out.lengths.max() == NEW


def test_loop_stops_when_every_row_has_ended(model, params, greedy):
  """Positions tell how many steps were run: with one row that ends at its third token, two after the first."""
  stop = int(greedy.tokens[1, 2])
  assert stop not in greedy.tokens[1, :2]
  ending = Transformer(dataclasses.replace(model.config, eos_token_ids=(stop,)), model.plan)
  engine, prompts = Engine(ending), Prompts.of([np.array(PROMPTS[1][:2])], 4, [31], 0, [0])
  state = engine.prefill(params, prompts, sampler=Sampler(), capacity=40)
  state, (out, _) = engine.decode(params, state, sampler=Sampler(), steps=30, width=30)
  assert state.done.tolist() == [True]
  assert out[0, :2].tolist() == greedy.tokens[1, 1:3].tolist()
  assert (out[0, 2:] == -1).all()
  # Slot 3 was the last to be written.
  written = np.abs(np.asarray(state.cache.layers[0].values)).sum(axis=(0, 1, 3)) > 0
  np.testing.assert_array_equal(written, np.arange(40) < 4)


def test_cache_of_followers_has_no_keys(model, params, batch):
  prompts = Prompts.of([row[:length] for row, length in zip(*batch)], 4, [NEW] * 3, 0, range(3))
  read = functools.partial(Engine(model).prefill, sampler=Sampler(), capacity=9)
  state = jax.eval_shape(read, params, prompts)
  assert isinstance(state, DecodeState)
  assert [layer.keys is None for layer in state.cache.layers] == [False, True, False, True]
  shapes = {leaf.shape for leaf in jax.tree.leaves(state.cache)}
  assert shapes == {(3, 2, 9, 8)}
  count = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
  assert count == sa_jax.cost(model.config, model.plan, 3, 9).kv_cache_bytes
  assert count == Cache.empty(model.config, model.plan, 3, 9).nbytes


class TestSamples:
  def sample(self, model, params, tokens, lengths, **changes):
    arguments = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 0} | changes
    return sa_jax.generate(model, params, tokens, lengths, **arguments).tokens

  def test_seeds(self, model, params, batch, greedy):
    first = self.sample(model, params, *batch)
    np.testing.assert_array_equal(first, self.sample(model, params, *batch))
    assert (first != self.sample(model, params, *batch, seed=1)).any()
    assert (first != greedy.tokens).any()

  def test_do_not_depend_on_other_rows(self, model, params, batch):
    tokens, lengths = batch
    first = self.sample(model, params, tokens, lengths)
    others = np.array([[1, 2, 3, 4], tokens[1], [9, 9, 9, 9]])
    changed = self.sample(model, params, others, np.array([4, lengths[1], 1]))
    np.testing.assert_array_equal(changed[1], first[1])

  def test_equal_prompts_are_continued_differently(self, model, params):
    tokens = self.sample(model, params, np.array([PROMPTS[0]] * 3), None)
    assert len(np.unique(tokens, axis=0)) > 1

  def test_top_k_1_is_greedy(self, model, params, batch, greedy):
    np.testing.assert_array_equal(
      self.sample(model, params, *batch, temperature=0.0, sampler=Sampler(1.0, top_k=1)), greedy.tokens
    )

  def test_small_top_p_is_greedy(self, model, params, batch, greedy):
    np.testing.assert_array_equal(
      self.sample(model, params, *batch, temperature=0.0, sampler=Sampler(1.0, top_p=1e-6)), greedy.tokens
    )


@pytest.mark.parametrize(
  ("tokens", "arguments", "message"),
  [
    ([[1, 61]], {}, "token 61 is outside the vocabulary of 61, 0 to 60"),
    ([[1, -2]], {}, "token -2 is outside the vocabulary"),
    ([1, 2], {}, "tokens must be integers of shape \\[batch, length\\]"),
    ([[1.5, 2.0]], {}, "tokens must be integers"),
    ([[1, 2]], {"lengths": [3]}, "a length of 3 does not fit rows of 2 tokens"),
    ([[1, 2]], {"lengths": [0]}, "a length of 0 does not fit rows of 2 tokens"),
    ([[1, 2]], {"lengths": [1, 2]}, "lengths must be integers of shape"),
    ([[1, 2]], {"lengths": [1.5]}, "lengths must be integers"),
    ([[1, 2]], {"lengths": [2], "attention_mask": [[1, 1]]}, "give lengths or attention_mask, not both"),
    ([[1, 2, 3]], {"attention_mask": [[1, 0, 1]]}, "rows \\[0\\] are empty, or have padding between tokens"),
    ([[2**32 + 5, 3]], {"attention_mask": [[1, 1]]}, "token 4294967301 is outside the vocabulary"),
    ([[1.9, 2.9]], {"attention_mask": [[1, 1]]}, "tokens must be integers"),
    ([[1, 2]], {"max_new_tokens": 0}, r"max_new_tokens=0 \(must be at least 1\)"),
    ([[1, 2]], {"max_new_tokens": 2.5}, r"max_new_tokens=2.5 \(must be an integer\)"),
    ([[1, 2]], {"samples": 1.5}, r"samples=1.5 \(must be an integer\)"),
    ([[1, 2]], {"seed": True}, r"seed=True \(must be an integer\)"),
    ([[1, 2], [3]], {}, "prompts must have one length"),
    ([[1, 2, 3]], {"cache_length": 2}, "do not fit a cache of 2 slots; 8 are needed"),
    (
      [[1, 2, 3]],
      {"cache_length": 7},
      "prompts of up to 3 tokens .* with 6 new ones do not fit a cache of 7 slots; 8 are",
    ),
    ([[]], {}, "a batch needs at least one row of at least one token"),
    (np.zeros((0, 3), np.int32), {}, "at least one row"),
  ],
)
def test_refused(model, params, tokens, arguments, message):
  tokens = np.asarray(tokens, np.int32) if len(tokens) == 0 or tokens == [[]] else tokens
  with pytest.raises(ValueError, match=message):
    sa_jax.generate(model, params, tokens, **({"max_new_tokens": NEW} | arguments))


class TestPadding:
  def test_right_pad(self):
    tokens, lengths = right_pad([[1, 2, 3], [4]], pad=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert lengths.tolist() == [3, 1]
    assert tokens.dtype == lengths.dtype == np.int32

  @pytest.mark.parametrize("rows", [[], [[1], []]])
  def test_rows_that_do_not_pad(self, rows):
    with pytest.raises(ValueError, match="every row needs at least one token"):
      right_pad(rows)

  def test_either_side(self):
    tokens = np.array([[0, 0, 5, 6], [7, 8, 0, 0], [1, 2, 3, 4]])
    mask = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    for form in (mask, mask.astype(bool)):
      shifted, lengths = to_right_padded(tokens, form)
      assert lengths.tolist() == [2, 2, 4]
      assert [row[:length].tolist() for row, length in zip(shifted, lengths)] == [[5, 6], [7, 8], [1, 2, 3, 4]]

  @pytest.mark.parametrize(
    ("mask", "message"),
    [
      ([[1, 0, 1]], "rows \\[0\\] are empty, or have padding between tokens; pad on one side only"),
      ([[0, 0, 0]], "rows \\[0\\] are empty"),
      ([[1, 2, 1]], "attention_mask must be 1 at tokens and 0 at padding"),
      ([[1, 1]], "tokens and attention_mask must both be \\[batch, length\\]"),
    ],
  )
  def test_masks_that_do_not_fit(self, mask, message):
    with pytest.raises(ValueError, match=message):
      to_right_padded(np.array([[1, 2, 3]]), np.array(mask))


def test_programs_are_few(model, params):
  """Any number of new tokens is one program, and so is any temperature and any p."""
  counts = lambda: (Engine.prefill.jitted._cache_size(), Engine.decode.jitted._cache_size())
  fresh = Transformer(dataclasses.replace(model.config, max_length=999), model.plan)
  run = lambda **how: sa_jax.generate(fresh, params, np.ones((1, 8), np.int32), **how)
  before = counts()
  for new in (3, 4, 20, 21, 22):
    assert run(max_new_tokens=new).tokens.shape == (1, new)
  assert counts() == (before[0] + 1, before[1] + 1)
  for temperature in (0.7, 0.8, 1, 1.0):
    run(max_new_tokens=5, temperature=temperature)
  assert counts() == (before[0] + 2, before[1] + 2)
  for p in (0.3, 0.9, 1):
    run(max_new_tokens=5, sampler=Sampler(0.7, top_p=p))
  assert counts() == (before[0] + 3, before[1] + 3)


class TestRoom:
  @pytest.fixture
  def layers(self, model, params):
    return sa_jax.params.as_layers(params, model.plan)

  def test_a_grown_cache_goes_on(self, model, layers):
    tokens = jnp.asarray([PROMPTS[0]], jnp.int32)
    length = jnp.full(1, tokens.shape[1], jnp.int32)
    _, cache = model.apply({"params": layers}, tokens, length, method=Transformer.prefill)
    got, _ = model.apply({"params": layers}, tokens[:, 0], cache.grow(9), length, method=Transformer.step)
    wanted = logits_of(model, layers, jnp.concatenate([tokens, tokens[:, :1]], axis=1), None)[:, -1]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    with pytest.raises(sa_jax.UserError, match="cannot shrink to 1; grow it to at least 4"):
      cache.grow(1)

  def test_a_step_past_the_end_is_an_error_or_nan(self, model, layers):
    cache = Cache.empty(model.config, model.plan, 2, 4)
    step = lambda positions: model.apply(
      {"params": layers}, jnp.ones(2, jnp.int32), cache, positions, method=Transformer.step
    )[0]
    with pytest.raises(
      sa_jax.UserError, match=r"a row of 5 tokens does not fit into a cache of 4 slots; use cache.grow"
    ):
      step(jnp.array([3, 4]))
    finite = np.isfinite(jax.jit(step)(jnp.array([3, 4])))
    assert finite[0].all()
    assert not finite[1].any()


def test_a_cache_that_is_larger_than_memory_is_refused_before_anything_is_allocated(model, params):
  for refused in (
    lambda: sa_jax.generate(model, params, [[1, 2]], max_new_tokens=3, cache_length=10**18),
    lambda: sa_jax.generate(model, params, [[1, 2]], max_new_tokens=10**18),
    lambda: next(sa_jax.decode.stream(model, params, [1, 2], Settings(10**18))),
    lambda: sa_jax.decode.Batcher(model, params, sa_jax.decode.Serving(capacity=10**13)),
  ):
    with pytest.raises(
      sa_jax.UserError, match=r"^a cache of \d+ rows of [\d,]+ tokens takes [\d,.]+ GB, but there are only"
    ):
      refused()


def test_all_rows_and_caches_that_will_be_are_counted(model, params, monkeypatch):
  prompts = [[1, 2], [3, 4]]
  monkeypatch.setattr(room, "_memory", lambda devices: 1)
  draft = decode.Draft.sharing(model, params, "0:1-3")
  for refused, what in (
    (lambda: sa_jax.generate(model, params, prompts, samples=3, temperature=1.0), "a cache of 6 rows"),
    (lambda: sa_jax.generate(model, params, prompts, samples=3, temperature=1.0, slots=5), "a cache of 5 rows"),
    (lambda: decode.beam_search(model, params, prompts, how=decode.Beams(4)), "a cache of 8 rows"),
    (lambda: decode.speculate(model, params, draft, prompts), "2 caches of 2 rows"),
    (lambda: decode.speculate(model, params, decode.Draft.early_exit(model, params, 2), prompts), "a cache of 2 rows"),
  ):
    with pytest.raises(sa_jax.UserError, match=f"^{what}"):
      refused()
