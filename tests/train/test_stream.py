"""Rows of examples that a source gives while training goes on: grain's, Hugging Face's, any iterable."""

import json

import grain
import jax
import numpy as np
import pytest

from sa_jax import UserError
from sa_jax.train.data import Cursor, Gathered, Part, Reading, Shape, Stream, byte_tokenizer, hub_dataset

TEXTS = [chr(ord("a") + number) * (1 + number % 5) for number in range(23)]
SHAPE = Shape(rows=2, length=8, vocabulary=257)


class Again:
  """An iterable that starts anew each time."""

  def __iter__(self):
    return iter([{"text": text} for text in TEXTS])


class Knowing(Again):
  """One that knows its position, as Hugging Face's streams do."""

  def __init__(self):
    self.at = 0

  def __iter__(self):
    while self.at < len(TEXTS):
      self.at += 1
      yield TEXTS[self.at - 1]
    self.at = 0

  def state_dict(self):
    return {"at": self.at}

  def load_state_dict(self, state):
    self.at = state["at"]


SOURCES = {
  "list": lambda: TEXTS,
  "grain source": lambda: grain.MapDataset.source(TEXTS).map(lambda text: {"text": text}),
  "grain iterator": lambda: grain.MapDataset.source(TEXTS).repeat().to_iter_dataset(),
  "iterable": Again,
  "iterable with a state": Knowing,
  "iterator": lambda: iter(TEXTS * 9),
}


def stream(source, part=Part(), shape=SHAPE, seed=3, **reading) -> Stream:
  return Stream(Cursor(source, seed, part), byte_tokenizer(), shape, Reading(**reading))


class Opening:
  """A tokenizer that begins texts with token 1."""

  def opening(self, token):
    return [1]

  def special_id(self, name):
    return None


def test_rows_that_continue_a_document_begin_with_the_start_token():
  """Also those that a batch leaves to the next: a document's tokens follow each other from row to row."""
  tokens = [1, *range(10, 40)]
  rows = Stream(Cursor([{"tokens": tokens}], 0, Part()), Opening(), Shape(rows=2, length=12, vocabulary=64))
  batches = [next(rows) for _ in range(6)]
  read = np.concatenate([batch.tokens for batch in batches])
  assert (read[:, 0] == 1).all()
  assert not np.concatenate([batch.weights for batch in batches])[:, 0].any()
  pieces = [[1, *range(10, 21)], [1, *range(21, 32)], [1, *range(32, 40), 0, 0, 0]]
  assert read.tolist() == pieces * 4


def documents(batches) -> list[str]:
  """The texts of batches' documents, in order of the alphabet; each ends with its end token."""
  found = []
  for batch in batches:
    for row, segments in zip(batch.tokens, batch.segments, strict=True):
      for segment in range(1, segments.max() + 1):
        ids = row[segments == segment]
        assert ids[-1] == 256
        found.append(bytes(ids[:-1].tolist()).decode())
  return sorted(found)


@pytest.mark.parametrize("name", SOURCES)
def test_every_example_once_an_epoch_and_exactly_on_from_a_position(name):
  first = stream(SOURCES[name]())
  batches = [next(first) for _ in range(3)]
  state = json.loads(json.dumps(first.get_state()))
  batches += [next(first) for _ in range(9)]
  assert {batch.tokens.shape for batch in batches} == {(2, 8)}
  resumed = stream(SOURCES[name]())
  resumed.set_state(state)
  for batch in batches[3:]:
    jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)
  assert set(documents(batches)) == set(TEXTS)


@pytest.mark.parametrize("name", ["list", "iterable"])
def test_hosts_read_parts(name):
  """Each its own, together all."""
  parts = [stream(SOURCES[name](), Part(index, 2)) for index in range(2)]
  found = [set(documents(next(part) for _ in range(5))) for part in parts]
  assert found[0] == set(TEXTS[0::2])
  assert found[1] == set(TEXTS[1::2])


def test_positions_of_all_hosts_are_saved_together():
  make = lambda index: Gathered(stream(Again(), Part(index, 2)), Part(index, 2), lambda mine: gathered)
  hosts, gathered = [make(0), make(1)], []
  for host in hosts:
    next(host)
  gathered = [{"part": index, "state": host._stream.get_state()} for index, host in enumerate(hosts)]
  states = [json.loads(json.dumps(host.get_state())) for host in hosts]
  assert states[0] == states[1]
  resumed = [make(0), make(1)]
  for host, again in zip(hosts, resumed):
    again.set_state(states[0])
    np.testing.assert_array_equal(next(again).tokens, next(host).tokens)
  with pytest.raises(UserError, match="was read in 2 parts, and cannot continue in 1"):
    Gathered(stream(Again()), Part(), lambda mine: [mine]).set_state(states[0])


def test_what_is_learnt_of_each_kind_of_example():
  source = [
    {"tokens": [1, 2, 3], "trained": [0, 0, 1]},
    {"tokens": np.arange(5, dtype=np.int64)},
    {"prompt": "p", "completion": "c"},
  ]
  batch = next(stream(iter(source * 64), shape=Shape(rows=1, length=256, vocabulary=257)))
  learnt = {
    tuple(batch.tokens[0][(batch.segments[0] == segment) & (batch.weights[0] > 0)].tolist())
    for segment in range(1, batch.segments.max() + 1)
  }
  assert learnt == {(3,), (1, 2, 3, 4), (ord("c"), 256)}
  everything = next(stream(iter(source * 64), shape=Shape(rows=1, length=256, vocabulary=257, learn_all=True)))
  assert everything.weights.sum() > batch.weights.sum()


@pytest.mark.parametrize(
  ("source", "why"),
  [
    ([], "the source has 0 examples, but there are 1 hosts"),
    (iter([]), "the source has no example, before the last step"),
    (iter(TEXTS[:3]), "the source has ended after 3 examples, before the last step"),
    (
      [{"tokens": [[1]]}],
      r"example 1 of the source: 'tokens' and 'trained' must be lists of the same length, not \(1, 1\)",
    ),
    ([{"tokens": [-1, 2]}], "has numbers that are not token ids"),
    ([{"tokens": [1, 300]}], "the source has token 300, but the model's vocabulary has 257 tokens"),
    ([{"txt": "a"}], r"example 1 of the source: it has the keys \['txt'\]"),
    ([7], "example 1 of the source: .*int"),
    ([{"text": "\ud83d"}], "half of a surrogate pair"),
  ],
)
def test_bad_sources(source, why):
  with pytest.raises(UserError, match=why):
    next(stream(source))


def test_bad_examples_are_counted():
  reading = stream([{"text": "good"}, {"txt": "bad"}, 7], skip_bad=True)
  next(reading)
  assert reading.report.bad > 0
  assert reading.report.documents > 0


def test_rows_without_segments_have_none():
  batch = next(stream(TEXTS, shape=Shape(rows=2, length=8, packing="none", vocabulary=257)))
  assert batch.segments is None


def test_a_dataset_of_hugging_faces_form(tmp_path):
  """A local folder, read as a stream, each host its part; where it was is exact."""
  pytest.importorskip("datasets")
  for half in range(2):
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[half::2]]
    (tmp_path / f"train-{half}.jsonl").write_text("".join(lines))
  make = lambda part=Part(): stream(hub_dataset(str(tmp_path), None, "train", part))
  first = make()
  batches = [next(first) for _ in range(2)]
  state = json.loads(json.dumps(first.get_state()))
  batches += [next(first) for _ in range(6)]
  assert set(documents(batches)) == set(TEXTS)
  resumed = make()
  resumed.set_state(state)
  for batch in batches[2:]:
    np.testing.assert_array_equal(next(resumed).tokens, batch.tokens)
  parts = [set(documents(next(make(Part(index, 2))) for _ in range(1))) for index in range(2)]
  assert not parts[0] & parts[1]
  with pytest.raises(UserError, match="the dataset .* cannot be read"):
    hub_dataset(str(tmp_path), None, "absent", Part())
