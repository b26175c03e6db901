"""Log-likelihoods against log-softmax of `model.apply`, prefixes read once, and few programs."""

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

import sa_jax
from sa_jax.evaluation import Scorer, scoring
from sa_jax.evaluation.prefixes import Row, families, padded_size, rows_of_requests
from tests import host_devices, tiny


@pytest.fixture(scope="module")
def model():
  """A group and an anchor without followers, which are different paths of the cache."""
  return tiny.model("0:1", num_layers=3, max_length=256)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


def plainly(model, params, requests):
  """Each request alone, through whole float64 log-probabilities."""
  longest = max(len(context) + len(continuation) for context, continuation in requests)
  rows = np.zeros((len(requests), longest), np.int32)
  for row, (context, continuation) in zip(rows, requests):
    row[: len(context) + len(continuation)] = [*context, *continuation]
  logits = np.asarray(jax.jit(model.apply)({"params": params}, rows[:, :-1]), np.float64)
  out = []
  for row, log_probs, (context, continuation) in zip(rows, log_softmax(logits, axis=-1), requests):
    at = np.arange(len(context) - 1, len(context) + len(continuation) - 1)
    wanted = row[at + 1]
    out.append((log_probs[at, wanted].sum(), (log_probs[at].argmax(axis=-1) == wanted).all()))
  return out


def check(found, wanted):
  np.testing.assert_allclose([each.log_likelihood for each in found], [value for value, _ in wanted], atol=2e-5)
  assert [each.greedy for each in found] == [greedy for _, greedy in wanted]


def tokens(rng, length):
  return rng.integers(0, 61, length).tolist()


@pytest.fixture(scope="module")
def requests():
  """Options of equal and unequal length, questions after the same examples, and texts by themselves."""
  rng = np.random.default_rng(0)
  out = []
  for _ in range(3):
    context = tokens(rng, rng.integers(20, 40))
    out += [(context, tokens(rng, rng.integers(1, 9))) for _ in range(4)]
  examples = tokens(rng, 60)
  for _ in range(5):
    question = examples + tokens(rng, rng.integers(3, 12))
    out += [(question, [option]) for option in (5, 6, 7)]
  out += [(tokens(rng, rng.integers(1, 70)), tokens(rng, rng.integers(1, 20))) for _ in range(6)]
  return [out[index] for index in rng.permutation(len(out))]


def test_every_kind_of_request_against_log_softmax(model, params, requests):
  wanted = plainly(model, params, requests)
  likeliest = [index for index, (_, greedy) in enumerate(wanted) if greedy]
  check(Scorer(model, params, batch_tokens=256)(requests), wanted)
  # What greedy decoding gives is called so: continue some contexts by their likeliest tokens.
  contexts = [context for context, _ in requests[:3]]
  greedy = [(c, sa_jax.generate(model, params, np.array([c]), None, 3).tokens[0].tolist()) for c in contexts]
  found = Scorer(model, params, batch_tokens=256)(greedy)
  assert [each.greedy for each in found] == [True] * 3
  assert len(likeliest) < len(requests)


def test_a_batch_is_as_large_as_was_asked_for(model, params, requests, monkeypatch):
  """With the cached tokens that its rows have copies of."""
  sizes, hidden_after = [], scoring._hidden_after

  def watched(model, params, cache, owners, tokens, rows):
    sizes.append((len(tokens), cache.capacity + tokens.shape[1]))
    return hidden_after(model, params, cache, owners, tokens, rows)

  monkeypatch.setattr(scoring, "_hidden_after", watched)
  Scorer(model, params, batch_tokens=256)(requests)
  assert max(rows for rows, _ in sizes) > 1
  assert all(rows * length <= 256 for rows, length in sizes)


def test_compilations_are_bounded(model, params, requests):
  """A second set of requests like the first compiles nothing; another order and the batch's mates change nothing."""
  scorer = Scorer(model, params, batch_tokens=512)
  scorer._program = 0  # every size has its program
  first = scorer(requests)

  def count() -> int:
    gc.collect()  # programs of earlier tests' models go with them
    return sum(program.jitted._cache_size() for program in scoring.PROGRAMS)

  before = count()
  again = scorer([(context[::-1], continuation) for context, continuation in requests])
  assert len(again) == len(first)
  # Reversed contexts share no beginning but their options': sizes differ by a padded_size here and there at most.
  assert count() - before <= 8
  settled = count()
  np.testing.assert_allclose(
    [each.log_likelihood for each in scorer(requests[::-1])],
    [each.log_likelihood for each in first[::-1]],
    atol=2e-5,
  )
  assert count() == settled


def test_another_size_saves_more_than_its_program_costs(model, params):
  """Three items of 100 tokens, padded to 128, and fifty of 40: 48 are enough, which saves 50 × 80 tokens."""
  scorer = Scorer(model, params, batch_tokens=384)

  def batches(program, **options):
    scorer._program = program
    return [(len(b.items), b.rows, b.size) for b in scorer._by_length([100] * 3 + [40] * 50, int, **options)]

  assert batches(3999) == [(3, 3, 128), *[(8, 8, 48)] * 6, (2, 8, 48)]
  assert batches(4001) == [(3, 3, 128)] * 17 + [(2, 3, 128)]
  assert batches(0)[-1] == (2, 2, 48)
  # Where two rows see each, twice as much is saved.
  assert batches(4001, readers=lambda item: 2) == batches(3999)


def test_buckets_are_few():
  sizes = {padded_size(size) for size in range(1, 4097)}
  assert len(sizes) == 17
  assert all(size <= padded_size(size) <= max(16, 1.5 * size) for size in range(1, 4097))


def rows(*texts, first=None):
  """Rows whose tokens are letters."""
  return [
    Row(np.frombuffer(text.encode(), np.uint8).astype(np.int32), len(text) - 1 if first is None else first, (number,))
    for number, text in enumerate(sorted(texts))
  ]


def shape(grouped):
  return sorted((family.shared, len(family.rows)) for family in grouped)


def test_families_save_most():
  options = rows(*("question" + letter + "1234567" for letter in "abcd"), first=7)
  assert shape(families(options)) == [(7, 4)]
  other = rows(*("zuestion" + letter + "1234567" for letter in "abc"), first=7)
  assert shape(families(options + other)) == [(7, 3), (7, 4)]
  assert shape(families(rows("abc", "xyz"))) == [(0, 1), (0, 1)]
  # Examples before all questions: sharing them saves more than sharing each question.
  long = rows(*("e" * 50 + question + option for question in ("one", "two", "six") for option in "pq"))
  assert shape(families(long)) == [(50, 6)]
  # Two tokens in common are not worth reading apart.
  assert shape(families(rows(*("Q:" + letter * 30 for letter in "abc")))) == [(0, 1)] * 3
  assert families([]) == []


def test_a_chain_of_beginnings_is_one_row():
  """A text's every beginning, as when words are added one by one: the longest answers for all."""
  text = np.arange(3000, dtype=np.int32) % 61
  chain = rows_of_requests([(text[:length], length - 1) for length in range(1, 3001)])
  assert [(len(row.tokens), row.first, len(row.requests)) for row in chain] == [(3000, 0, 3000)]
  apart = rows_of_requests([(text[:length], length - 1) for length in (1, 2, 3, 3)], merge=False)
  assert [len(row.requests) for row in apart] == [1, 1, 2]
  assert len(families(apart)) == 3


def test_dynamic_rope_shares_nothing():
  """Its angles depend on a row's length: a beginning read in a shorter row is another beginning."""
  rope = sa_jax.ops.RopeConfig(scaling="dynamic", factor=4.0, original_max_length=16)
  model = tiny.model("0:1", num_layers=2, rope=rope)
  params = tiny.params(model)
  context = tokens(np.random.default_rng(1), 30)
  requests = [(context, [1, 2, 3]), (context, [1, 2]), (context, [4])]
  found = Scorer(model, params)(requests)
  for request, scored in zip(requests, found):
    check([scored], plainly(model, params, [request]))


def test_processes_partition_the_work():
  items = list(range(11))
  parts = [list(scoring.part(items, index, 3)) for index in range(3)]
  assert sorted(item for each in parts for item in each) == items
  assert max(map(len, parts)) - min(map(len, parts)) <= 1


PROCESS = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from sa_jax.evaluation import Scorer
from tests import tiny
model = tiny.model("0:1", num_layers=2)
requests = [([5, 6, 7, number], [8, number]) for number in range(7)]
print([tuple(scored) for scored in Scorer(model, tiny.params(model))(requests)])
"""


def test_every_process_returns_the_same():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | host_devices(1) | {"JAX_PLATFORMS": "cpu"}
  run = lambda index: subprocess.Popen(
    [sys.executable, "-c", PROCESS, address, str(index)],
    stdout=subprocess.PIPE, env=environment, cwd=Path(__file__).parents[2], text=True,
  )  # fmt: skip
  first, second = (process.communicate(timeout=300)[0].splitlines()[-1] for process in [run(0), run(1)])
  assert first == second
  model = tiny.model("0:1", num_layers=2)
  alone = Scorer(model, tiny.params(model))([([5, 6, 7, number], [8, number]) for number in range(7)])
  np.testing.assert_allclose([value for value, _ in eval(first)], [value for value, _ in alone], atol=2e-5)


def test_refused(model, params):
  scorer = Scorer(model, params)
  with pytest.raises(ValueError, match="request 0 has no context"):
    scorer([([], [1])])
  with pytest.raises(ValueError, match="request 1 has no continuation"):
    scorer([([1], [1]), ([1], [])])
  with pytest.raises(ValueError, match="request 0 has tokens 1 to 61; the vocabulary is 0 to 60"):
    scorer([([1], [61])])
  with pytest.raises(ValueError, match="batch_tokens must be at least 1, not 0"):
    Scorer(model, params, batch_tokens=0)
  assert scorer([]) == []
