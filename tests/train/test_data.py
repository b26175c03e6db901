"""Training data: documents, tokens, rows, batches, hosts."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from sa_jax import Tokenizer
from sa_jax.sharding import make_mesh, named_sharding
from sa_jax.train import data
from sa_jax.train.data import Reading, Report
from tests.train.texts import END, corpus_of, texts, write


def test_byte_tokenizer_is_bytes(tmp_path):
  tokenizer = data.byte_tokenizer()
  text = "naïve café — 日本語 🙂\n\ttabs  spaces\r\n"
  assert tokenizer.encode(text) == list(text.encode())
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.backend.get_vocab_size() == data.BYTE_VOCABULARY
  assert tokenizer.encode("a<|endoftext|>") == [ord("a"), END]


@pytest.mark.parametrize(
  ("documents", "expected"),
  [
    ("file", ["[one\ntwo\n \n\nthree<|endoftext|> four<|endoftext|>]"]),
    ("blank_lines", ["[one\ntwo\n<|endoftext|>]", "[three<|endoftext|> four<|endoftext|>]"]),
    ("endoftext", ["[one\ntwo\n \n\nthree<|endoftext|>]", "[ four<|endoftext|>]"]),
  ],
)
def test_documents_of_text(tmp_path, documents, expected):
  file = write(tmp_path / "a.txt", "one\ntwo\n \n\nthree<|endoftext|> four")
  tokenizer = data.byte_tokenizer()
  corpus = data.open_corpus([file], tokenizer, Reading(documents=documents))
  assert texts(corpus, tokenizer) == expected


def test_documents_of_objects(tmp_path):
  """What is learnt of each kind of object; without a chat template, Alpaca has its own prompt."""
  lines = [
    {"body": "plain"},
    {"prompt": "2+2=", "completion": " 4"},
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"instruction": "Hi.", "input": "", "output": "Ho"},
  ]
  tokenizer = data.byte_tokenizer()
  corpus = data.open_corpus([write(tmp_path / "a.jsonl", *lines)], tokenizer, Reading(text_key="body"))
  alpaca = "Below is an instruction that describes a task"
  request = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
  assert texts(corpus, tokenizer) == [
    "[plain<|endoftext|>]",
    "2+2=[ 4<|endoftext|>]",
    f"{alpaca}, paired with an input that provides further context. {request}Add.\n\n### Input:\n1 1\n\n"
    "### Response:\n[2<|endoftext|>]",
    f"{alpaca}. {request}Hi.\n\n### Response:\n[Ho<|endoftext|>]",
  ]
  same = write(tmp_path / "a.json", json.dumps(lines))
  np.testing.assert_array_equal(data.open_corpus([same], tokenizer, Reading(text_key="body")).tokens, corpus.tokens)


def test_start_token_and_pieces_of_merged_tokens(tmp_path):
  """A start token is read, not learnt; a token over the border between prompt and completion belongs to the latter."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  tokenizer = Tokenizer(backend, None, ())
  corpus = data.open_corpus([write(tmp_path / "a.jsonl", {"prompt": "aba", "completion": "ba"})], tokenizer)
  assert corpus.tokens.tolist() == [0, 3, 3, 1]
  assert corpus.trained.tolist() == [False, False, True, True]


def test_cache_gives_the_same_tokens(tmp_path):
  tokenizer = data.byte_tokenizer()
  files = [write(tmp_path / "a.txt", "one\n\ntwo"), write(tmp_path / "b.jsonl", {"prompt": "p", "completion": "c"})]
  reading = Reading(documents="blank_lines", cache=tmp_path / "cache")
  plain = data.open_corpus(files, tokenizer, Reading(documents="blank_lines"))
  for _ in range(2):
    cached = data.open_corpus(files, tokenizer, reading)
    for name in ("tokens", "trained", "offsets"):
      np.testing.assert_array_equal(getattr(cached, name), getattr(plain, name))
    assert cached.report == plain.report
    assert isinstance(cached.tokens, np.memmap)
  assert len(list(reading.cache.iterdir())) == 1
  files[0].write_text("one\n\nTwo")
  assert data.open_corpus(files, tokenizer, reading).tokens[5] == ord("T")
  assert len(list(reading.cache.iterdir())) == 2


def test_pack_by_hand():
  assert data.pack([3, 4, 2, 5, 1, 2], 6) == [[0, 5], [1, 2], [3, 4]]
  assert data.pack([6, 6, 1], 6) == [[0], [1], [2]]
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 65, 2000)
  rows = data.pack(sizes.tolist(), 64)
  assert sorted(piece for row in rows for piece in row) == list(range(2000))
  used = [sum(sizes[piece] for piece in row) for row in rows]
  assert max(used) <= 64
  assert sum(used) / (64 * len(rows)) > 0.97


def test_rows_by_hand():
  """A long document goes on in the next row; each document's first token, prompts and padding weigh nothing."""
  rows = data.make_rows(corpus_of(7, 2, 3, prompts=[0, 0, 2]), 5)
  batch = rows.read([0, 1, 2, -1])
  assert batch.tokens.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 0], [9, 10, 11, 0, 0], [0] * 5]
  assert batch.segments.tolist() == [[1] * 5, [1, 1, 2, 2, 0], [1, 1, 1, 0, 0], [0] * 5]
  assert batch.weights.tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0] * 5]
  assert (batch.tokens.dtype, batch.segments.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)
  unpacked = data.make_rows(corpus_of(7, 2, 3), 5, "none")
  assert unpacked.read([1, 2]).tokens.tolist() == [[5, 6, 0, 0, 0], [7, 8, 0, 0, 0]]
  assert unpacked.read([0]).segments is None
  assert data.make_rows(corpus_of(8, 5), 5).read([0]).segments is None


def test_a_row_from_the_middle_of_a_document_begins_with_the_start_token():
  """Which is not learnt, and from which the next token is; the document's own beginning has it already."""
  corpus = dataclasses.replace(corpus_of(8, 3), start=(99,))
  batch = data.make_rows(corpus, 5).read([0, 1, 2])
  assert batch.tokens.tolist() == [[0, 1, 2, 3, 4], [99, 5, 6, 7, 0], [8, 9, 10, 0, 0]]
  assert batch.weights.tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]
  # A last piece of one token has something to be predicted from.
  assert data.make_rows(dataclasses.replace(corpus_of(6), start=(99,)), 5).read([1]).weights.tolist() == [
    [0, 1, 0, 0, 0]
  ]
  with pytest.raises(ValueError, match="no room for text after 1 start tokens"):
    data.make_rows(corpus, 1)


def test_texts_begin_with_the_tokenizers_start_token(tmp_path):
  """Or the one that the settings name, or none; in a cache too, which knows them apart."""
  tokenizer = data.byte_tokenizer()
  tokenizer.backend.add_special_tokens(["<s>", "<t>"])
  tokenizer.backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 257)]
  )
  path = tmp_path / "a.txt"
  path.write_text("abc")
  for cache in (None, tmp_path / "cache"):
    for choice, first in (("auto", [257]), ("none", []), ("<t>", [258])):
      corpus = data.open_corpus([path], tokenizer, Reading(start_token=choice, cache=cache))
      assert corpus.tokens.tolist() == [*first, *b"abc", 256]
      assert corpus.start == tuple(first)
  with pytest.raises(ValueError, match=r"no token '<u>' \(`start_token`\)"):
    data.open_corpus([path], tokenizer, Reading(start_token="<u>"))


def test_samples_longer_than_the_context():
  corpus = corpus_of(3, 9, 9, prompts=[1, 4, 8])
  with pytest.raises(ValueError, match="sample 1 has 9 tokens, the context 6; `too_long=cut`"):
    data.make_rows(corpus, 6)
  rows = data.make_rows(corpus, 6, "none", "cut")
  assert rows.read([0, 1]).tokens.tolist() == [[0, 1, 2, 0, 0, 0], [3, 4, 5, 6, 7, 8]]
  assert (len(rows), rows.spans.cut, rows.spans.barren) == (2, 2, 1)
  with pytest.raises(ValueError, match="nothing to train on"):
    data.make_rows(corpus_of(3, prompts=[3]), 6)


@pytest.mark.parametrize(
  ("name", "contents", "message"),
  [
    ("empty.txt", "", "empty.txt has no document: it is empty"),
    ("blank.txt", " \n\n", "blank.txt has no document: it is empty"),
    ("empty.jsonl", "", "empty.jsonl has no document: it is empty"),
    ("empty.json", "", "empty.json has no document: it is empty"),
    ("broken.json", "[{", "broken.json is not JSON"),
    ("object.json", "{}", "must be a list of objects"),
    ("broken.jsonl", '{"text": "a"}\n\n{"text"\n', r"broken.jsonl, line 3: not JSON .*skip_bad=True"),
    ("keys.jsonl", '{"txt": "a"}\n', r"keys.jsonl, line 1: it has the keys \['txt'\]"),
    ("type.jsonl", '{"text": 3}\n', "type.jsonl, line 1: 'text' is int; must be a non-empty string"),
    ("list.jsonl", "[1]\n", "list.jsonl, line 1: must be a JSON object, not list"),
    ("chat.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "there is no assistant message"),
    ("absent", None, "there is no file .*absent"),
  ],
)
def test_bad_files(tmp_path, name, contents, message):
  if contents is not None:
    (tmp_path / name).write_text(contents)
  with pytest.raises(ValueError, match=message):
    data.open_corpus([tmp_path / name], data.byte_tokenizer())


def test_bad_lines_are_counted(tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_bytes(b'{"text": "a"}\n{"text"\n{"text": "\xff"}\n{"text": ""}\n{"text": "b"}\n')
  assert data.open_corpus([file], data.byte_tokenizer(), Reading(skip_bad=True)).report == Report(documents=2, bad=3)
  file.write_text("{\n")
  with pytest.raises(ValueError, match="all 1 of its lines are bad"):
    data.open_corpus([file], data.byte_tokenizer(), Reading(skip_bad=True))
  binary = tmp_path / "a.txt"
  binary.write_bytes(b"\xff")
  with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text"):
    data.open_corpus([binary], data.byte_tokenizer())


def test_epochs_and_position():
  """Every row once an epoch, another order each epoch and seed, and exactly on from a saved position."""
  rows = data.make_rows(corpus_of(*[3] * 10), 3)
  start = lambda seed=1: data.shuffled(rows, 4, seed, range(4))
  firsts = lambda iterator, count: np.stack([next(iterator).tokens[:, 0] // 3 for _ in range(count)])
  iterator = start()
  order = firsts(iterator, 5)
  epochs = order.reshape(2, 10)
  assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(10))] * 2
  assert (epochs[0] != epochs[1]).any()
  assert (epochs[0] != firsts(start(2), 5).reshape(2, 10)[0]).any()
  state = json.loads(json.dumps(iterator.get_state()))
  following = firsts(iterator, 3)
  resumed = start()
  resumed.set_state(state)
  np.testing.assert_array_equal(firsts(resumed, 3), following)


def test_batches_of_one_row():
  """Every row once an epoch."""
  rows = data.make_rows(corpus_of(*[3] * 5), 3)
  iterator = data.shuffled(rows, 1, 0, range(1))
  for _ in range(2):
    assert sorted(int(next(iterator).tokens[0, 0]) for _ in range(5)) == [0, 3, 6, 9, 12]


def test_hosts_partition_each_batch():
  """What each host reads, put together, is what one host would have read."""
  rows = data.make_rows(corpus_of(*[3] * 11), 3)
  whole = data.shuffled(rows, 8, 5, range(8))
  parts = [data.shuffled(rows, 8, 5, mine) for mine in (range(0, 4), range(4, 8))]
  for _ in range(3):
    halves = [next(part).tokens for part in parts]
    assert [half.shape for half in halves] == [(4, 3), (4, 3)]
    np.testing.assert_array_equal(np.concatenate(halves), next(whole).tokens)


def test_evaluation_reads_every_row_once():
  rows = data.make_rows(corpus_of(*[3] * 5), 3)
  batches = list(data.every_row_once(rows, 4, range(4)))
  assert [batch.tokens[:, 0].tolist() for batch in batches] == [[0, 3, 6, 9], [12, 0, 0, 0]]
  assert batches[1].weights.sum(axis=1).tolist() == [2, 0, 0, 0]
  assert len(list(data.every_row_once(rows, 4, range(4), limit=1))) == 1


def test_rows_on_devices():
  mesh = make_mesh(2, 2, 2)
  sharding = named_sharding(mesh, ("batch", "length"))
  assert data.host_rows(sharding, 8) == list(range(8))
  with pytest.raises(ValueError, match="a batch of 6 rows does not divide over 4 shards"):
    data.host_rows(sharding, 6)
  batch = data.make_rows(corpus_of(*[2] * 16), 4).read(range(8))
  placed = data.to_devices(batch, sharding, 8)
  assert placed.tokens.sharding == sharding
  assert {shard.data.shape for shard in placed.segments.addressable_shards} == {(2, 4)}
  np.testing.assert_array_equal(placed.weights, batch.weights)
