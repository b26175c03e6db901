"""Continuous batching: what a request gets does not depend on its neighbours."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax import Transformer
from sa_jax.decode import Batcher, Engine, PromptCache, Serving, pad_to, right_pad
from sa_jax.decode import batcher as batcher_module
from tests import tiny

LONGEST, CAPACITY = 24, 256


@pytest.fixture(scope="module")
def model():
  """Four of its 61 tokens end a row, so rows stop at places of their own."""
  made = tiny.model("0:1", num_layers=3, max_length=CAPACITY)
  return Transformer(dataclasses.replace(made.config, eos_token_ids=(7, 19, 23, 42)), made.plan)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 61, rng.integers(1, 200)).astype(np.int32) for _ in range(60)]


@pytest.fixture(scope="module")
def alone(model, params, prompts):
  """Each prompt's tokens from `generate` on it alone."""
  outs = [sa_jax.generate(model, params, prompt[None], None, LONGEST, cache_length=CAPACITY) for prompt in prompts]
  return [out.tokens[0, : out.lengths[0]].tolist() for out in outs]


def test_sixty_requests_get_what_each_gets_alone(model, params, prompts, alone):
  batcher = Batcher(model, params, Serving(slots=4, capacity=CAPACITY, chunk=5))
  limits = np.random.default_rng(1).integers(1, LONGEST + 1, len(prompts)).tolist()
  requests = [batcher.submit(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
  batcher.run()
  assert [request.tokens for request in requests] == [
    tokens[:limit] for tokens, limit in zip(alone, limits, strict=True)
  ]
  assert {request.status for request in requests} == {"done"}
  assert len({len(tokens) for tokens in alone}) > 5, "rows are meant to stop at different places"


def test_a_cancelled_request_frees_its_slot(model, params, prompts, alone):
  batcher = Batcher(model, params, Serving(slots=1, capacity=CAPACITY, chunk=2))
  long = max(range(len(alone)), key=lambda index: len(alone[index]))
  first, waiting, last = (batcher.submit(prompts[index], LONGEST) for index in (long, 1, 2))
  batcher.step()
  batcher.cancel(first)
  batcher.cancel(waiting)
  batcher.run()
  assert first.tokens == alone[long][: len(first.tokens)]
  assert len(first.tokens) == 3
  assert (first.status, waiting.status, last.status) == ("cancelled", "cancelled", "done")
  assert (waiting.tokens, last.tokens) == ([], alone[2])


def test_logits_that_are_not_finite_are_told_once(model, params, caplog):
  """Of the one row whose prompt has a damaged embedding, at its first token; the row beside it says nothing."""
  embedding = np.array(params["embed"]["embedding"])
  whole, unseen = [5, 9, 3], 60
  embedding[unseen] = np.nan
  damaged = {**params, "embed": {"embedding": embedding}}
  batcher = Batcher(model, damaged, Serving(slots=2, capacity=CAPACITY, chunk=2))
  batcher.submit(whole, 3)
  batcher.submit([*whole, unseen], 3, row=7)
  batcher.run()
  batcher.submit([unseen], 1)
  batcher.run()
  assert [record.getMessage().split(" on:")[0] for record in caplog.records if record.levelname == "WARNING"] == [
    "the logits of row 7 are NaN or infinite from its new token 1"
  ]


def test_a_request_that_does_not_fit_is_refused_alone(model, params, prompts, alone):
  batcher = Batcher(model, params, Serving(slots=2, capacity=CAPACITY))
  good = batcher.submit(prompts[0], LONGEST)
  with pytest.raises(ValueError, match="250 tokens with 24 new ones needs 273 cache slots, but a row has 256"):
    batcher.submit(np.zeros(250, np.int32), LONGEST)
  with pytest.raises(ValueError, match="token 61 is outside the vocabulary"):
    batcher.submit([61], LONGEST)
  with pytest.raises(ValueError, match="at least one token"):
    batcher.submit([], LONGEST)
  with pytest.raises(sa_jax.UserError, match="a flat list of tokens"):
    batcher.submit([[1, 2], [3]], LONGEST)
  batcher.run()
  assert good.tokens == alone[0]


def test_streamed_tokens_are_the_requests_tokens(model, params, prompts):
  batcher = Batcher(model, params, Serving(slots=2, capacity=CAPACITY, chunk=3))
  requests = [batcher.submit(prompt, 9) for prompt in prompts[:3]]
  streamed = {request: [] for request in requests}
  while batcher.busy:
    for request, new in batcher.step().items():
      assert len(new) <= 4, "a chunk, and the token of the prefill"
      streamed[request] += new
  assert [streamed[request] for request in requests] == [request.tokens for request in requests]


def test_generate_batches_continuously_beyond_its_slots(model, params, prompts):
  """Samples too: a row's depend on its number, not on its slot."""
  tokens = np.stack([prompt[:1] for prompt in prompts[:7]])
  settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, "cache_length": 64}
  static, continuous = (sa_jax.generate(model, params, tokens, **settings, slots=slots) for slots in (64, 2))
  np.testing.assert_array_equal(static.tokens, continuous.tokens)
  np.testing.assert_array_equal(static.lengths, continuous.lengths)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (
      {"slots": 0, "chunk": 0},
      r"serving:\n  slots=0 \(must be at least 1\)\n  chunk=0 \(must be at least 1\)",
    ),
    ({"slots": 2.5}, r"serving: slots=2.5 \(must be an integer\)"),
    ({"capacity": "64"}, r"serving: capacity='64' \(must be an integer\)"),
    ({"chunk": None}, r"serving: chunk=None \(must be an integer\)"),
    (
      {"capacity": 200, "cache_slots": 192},
      "cache_slots=192 .must be at least 256 for a row of capacity 200 in pages of 64",
    ),
  ],
)
def test_sizes_are_checked(sizes, message):
  with pytest.raises(sa_jax.UserError, match=message):
    Serving(**sizes)


def test_sizes_may_be_numpys():
  how = Serving(slots=np.int64(2), capacity=np.int32(200), cache_slots=np.int64(256))
  assert (how.page_size, how.page_count) == (64, 4)


def test_more_pages_than_there_is_memory_are_refused_before_anything_is_made(model, params):
  with pytest.raises(sa_jax.UserError, match=r"a cache of 15625000000000 rows of 64 tokens takes .* GB"):
    Batcher(model, params, Serving(slots=1, capacity=64, cache_slots=10**15))


def test_a_chunk_may_be_longer_than_any_row(model, params, prompts, alone):
  batcher = Batcher(model, params, Serving(slots=1, capacity=CAPACITY, chunk=1 << 40))
  request = batcher.submit(prompts[0], LONGEST)
  batcher.step()
  assert request.tokens == alone[0]


def test_longest_first_changes_the_order_and_not_the_tokens(model, params, prompts, alone):
  batcher = Batcher(model, params, Serving(slots=1, capacity=CAPACITY, longest_first=True))
  limits = [2, 5, 1, 4]
  requests = [batcher.submit(prompt, limit) for prompt, limit in zip(prompts, limits)]
  ended = []
  while batcher.busy:
    batcher.step()
    ended += [index for index, request in enumerate(requests) if request.status == "done" and index not in ended]
  assert ended == [1, 3, 0, 2]
  assert [request.tokens for request in requests] == [tokens[:limit] for tokens, limit in zip(alone, limits)]


def test_a_slot_that_is_waited_for_ends_the_steps(model, params, prompts, alone):
  batcher = Batcher(model, params, Serving(slots=2, capacity=CAPACITY, chunk=LONGEST))
  long = [index for index, tokens in enumerate(alone) if len(tokens) > 8][:2]
  first, _, waiting = (batcher.submit(prompts[index], limit) for index, limit in zip([*long, 0], [3, 8, 1]))
  news = batcher.step()
  # Of the two that run, one ends after 3 tokens: the other has no more by then, and the third can start.
  assert sorted(map(len, news.values())) == [3, 3]
  assert (first.status, waiting.status) == ("done", "waiting")


def test_run_comes_back_for_a_slot_and_not_for_every_chunk(model, params, prompts, monkeypatch):
  """Two requests in one slot: looked after every four tokens by `step`, and once each by `run`."""
  endless = Transformer(dataclasses.replace(model.config, eos_token_ids=()), model.plan)
  calls, decode = [], Engine.decode
  counted = lambda *given, **options: calls.append(given) or decode(*given, **options)
  monkeypatch.setattr(Engine, "decode", counted)

  def tokens(work):
    calls.clear()
    batcher = Batcher(endless, params, Serving(slots=1, capacity=CAPACITY, chunk=4))
    requests = [batcher.submit(prompt[:20], 17) for prompt in prompts[:2]]
    work(batcher)
    return [request.tokens for request in requests], len(calls)

  def watched(batcher):
    while batcher.busy:
      batcher.step()

  stepped, ran = tokens(watched), tokens(Batcher.run)
  assert stepped[0] == ran[0]
  assert (stepped[1], ran[1]) == (8, 2)


def test_what_a_row_leaves_behind_harms_no_other(model, params, prompts, alone):
  """NaN, say, of a model that overflows: the next row in the slot sees zero times what is past its end."""
  batcher = Batcher(model, params, Serving(slots=1, capacity=CAPACITY))
  broken = jax.tree.map(lambda x: jax.numpy.full_like(x, np.nan), batcher._state.cache)
  batcher._state = dataclasses.replace(batcher._state, cache=broken)
  shortest = min(range(len(prompts)), key=lambda index: len(prompts[index]))
  assert pad_to(len(prompts[shortest]), CAPACITY) < CAPACITY  # or prefill would fill the whole row
  request = batcher.submit(prompts[shortest], LONGEST)
  batcher.run()
  assert request.tokens == alone[shortest]


def test_an_interruption_loses_no_request(model, params, prompts, alone, monkeypatch):
  batcher = Batcher(model, params, Serving(slots=2, capacity=CAPACITY))
  requests = [batcher.submit(prompt, LONGEST) for prompt in prompts[:3]]

  def interrupted(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Engine, "admit", interrupted)
    with pytest.raises(KeyboardInterrupt):
      batcher.run()
  assert [request.status for request in requests] == ["waiting"] * 3
  batcher.run()
  assert [request.tokens for request in requests] == alone[:3]


def test_other_threads_submit_and_cancel_while_one_steps(model, params, prompts, alone):
  batcher = Batcher(model, params, Serving(slots=2, capacity=CAPACITY, chunk=1))
  requests = [batcher.submit(prompt, LONGEST) for prompt in prompts[:3]]

  def busy():
    for prompt in prompts[:3] * 20:
      batcher.cancel(batcher.submit(prompt, LONGEST))

  threads = [threading.Thread(target=work) for work in (busy, busy, batcher.run)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  batcher.run()
  assert [request.tokens for request in requests] == alone[:3]


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_a_seed_that_is_none_harms_nobody(model, params, prompts, alone, seed):
  batcher = Batcher(model, params, Serving(slots=1, capacity=CAPACITY))
  request = batcher.submit(prompts[0], LONGEST)
  with pytest.raises(sa_jax.UserError, match=r"seed=.* \(must be (0 to 4294967295|an integer)\)"):
    batcher.submit(prompts[1], LONGEST, seed=seed)
  batcher.run()
  assert request.tokens == alone[0]


@pytest.mark.parametrize("row", [-1, 2**31, 1.5, None])
def test_a_row_that_is_none_harms_nobody(model, params, prompts, alone, row):
  batcher = Batcher(model, params, Serving(slots=1, capacity=CAPACITY))
  request = batcher.submit(prompts[0], LONGEST)
  with pytest.raises(sa_jax.UserError, match=r"row=.* \(must be (0 to 2147483647|an integer)\)"):
    batcher.submit(prompts[1], LONGEST, row=row)
  batcher.run()
  assert request.tokens == alone[0]


def test_what_is_cancelled_while_its_last_tokens_are_generated_stays_so(model, params, prompts, alone, monkeypatch):
  batcher = Batcher(model, params, Serving(slots=1, capacity=CAPACITY))
  request, decode = batcher.submit(prompts[0], 2), Engine.decode
  cancelling = lambda *given, **options: batcher.cancel(request) or decode(*given, **options)
  monkeypatch.setattr(Engine, "decode", cancelling)
  batcher.step()
  assert (request.status, request.tokens, batcher.busy) == ("cancelled", alone[0][:2], False)


def test_a_request_is_cancelled_where_it_waits(model, params, prompts):
  one, other = (Batcher(model, params, Serving(slots=1, capacity=CAPACITY)) for _ in range(2))
  request = one.submit(prompts[0], LONGEST)
  with pytest.raises(sa_jax.UserError, match="belongs to another batcher"):
    other.cancel(request)
  assert (request.status, one.busy) == ("waiting", True)


@pytest.mark.parametrize(
  "changes",
  [
    {"local_layers": (0, 1), "window": 24},
    pytest.param({"cache_dtype": "int8"}, marks=pytest.mark.slow),
    pytest.param({"cache_dtype": "int4"}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_chunks_of_prompts_and_pages_change_no_token(changes, monkeypatch):
  """Of a model with grouped heads and a follower; two rows of the longest would need four of five pages."""
  model = tiny.model("0:1", num_layers=3, max_length=CAPACITY, head_dim=16, **changes)
  params, rng, chunks = tiny.params(model), np.random.default_rng(2), []
  prompts = [rng.integers(0, 61, length).astype(np.int32) for length in (3, 20, 7, 1, 90, 33)]
  limits = [20, 3, 9, 1, 5, 6]
  alone = sa_jax.generate(model, params, *right_pad(prompts), max(limits), cache_length=128).tokens.tolist()
  read = batcher_module.read
  monkeypatch.setattr(batcher_module, "read", lambda *given, chunk: chunks.append(chunk) or read(*given, chunk=chunk))
  batcher = Batcher(model, params, Serving(slots=4, capacity=128, cache_slots=320, chunk=1, together=2, read=32))
  requests = [batcher.submit(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
  running = []
  while batcher.busy:
    batcher.step()
    running.append(len(batcher._running))
  assert [request.tokens for request in requests] == [row[:limit] for row, limit in zip(alone, limits, strict=True)]
  assert chunks == [32] * 5, "prompts of 90 and 33 tokens are 3 and 2 chunks"
  assert max(running) > 2, "more rows than fit in one piece"


def test_a_long_prompt_that_is_being_read_goes_on_after_its_beginning_and_can_be_cancelled(
  model, params, prompts, alone, monkeypatch
):
  long = max(range(len(prompts)), key=lambda index: len(prompts[index]))
  lasting = max(range(len(prompts)), key=lambda index: (len(alone[index]), -len(prompts[index])))
  prefix, read, starts = PromptCache.read(model, params, prompts[long][:70]), batcher_module.read, []
  seen = lambda *given, chunk: starts.append(int(given[3])) or read(*given, chunk=chunk)
  monkeypatch.setattr(batcher_module, "read", seen)
  batcher = Batcher(model, params, Serving(slots=2, capacity=CAPACITY, chunk=4, read=64), prefix=prefix)
  first = batcher.submit(prompts[lasting], LONGEST)
  batcher.step()
  assert len(first.tokens) == 5
  cancelled, second = (batcher.submit(prompts[long], LONGEST) for _ in range(2))
  batcher.step()
  assert (starts, cancelled.status) == ([70], "waiting")
  assert len(first.tokens) == 6, "one decode step lies between two pieces"
  batcher.cancel(cancelled)
  batcher.run()
  assert starts == [70, *range(70, len(prompts[long]), 64)]
  assert (cancelled.tokens, first.tokens, second.tokens) == ([], alone[lasting], alone[long])
