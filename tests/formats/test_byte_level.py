"""Byte-level BPE from lists of ranks, Mistral's tekken.json and tiktoken's files, against tiktoken itself."""

import base64
import json
import random

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from sa_jax import UserError, load_tokenizer
from sa_jax.formats.byte_level import LETTERS, LLAMA_3_SPLIT

TEKKEN_SPLIT = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
  r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = [
  "The quick brown fox doesn't jump over 12345 lazy dogs, I'll say; HTTPServer getElementById x_1 = y**2",
  "Les naïfs ægithales hâtifs pondant à Noël où il gèle — ça va? «Œuvre» Straße ΑΒΓ αβγ Ἀχιλλεύς",
  "日本語のテキスト、漢字とかな。中文文本没有空格。 한국어 텍스트 ภาษาไทย हिन्दी में पाठ עברית العربية",
  "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u200d\ufeff \u00a0\u2003\u3000 tab\there\r\nnew\n\n\n  lines   \x00\x1f ½²³ Ⅷ ٣",
]
MARKS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]


@pytest.fixture(scope="module")
def ranked():
  """Byte strings by rank, learnt from texts of many alphabets."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(TEKKEN_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=LETTERS, show_progress=False)
  tokenizer.train_from_iterator([*LINES, *LINES], trainer)
  byte_of = {letter: byte for byte, letter in enumerate(LETTERS)}
  vocabulary = tokenizer.get_vocab()
  learnt = [bytes(byte_of[letter] for letter in token) for token in sorted(vocabulary, key=vocabulary.get)]
  return [*(bytes([byte]) for byte in range(256)), *(string for string in learnt if len(string) > 1)]


@pytest.fixture(scope="module")
def texts():
  """Odd ones, and 300 of random characters and of pieces of lines."""
  draw = random.Random(0)
  characters = [chr(code) for code in range(1, 0x3100) if not 0xD800 <= code < 0xE000] + list("🙂🙃\U00020000 \n\t'")
  scrambled = ["".join(draw.choices(characters, k=draw.randint(1, 30))) for _ in range(150)]
  cut = lambda line: line[draw.randrange(len(line)) :][: draw.randint(1, 40)]
  return [*LINES, "", " ", "\n", "'LL 'll", *scrambled, *(cut(draw.choice(LINES)) for _ in range(150))]


def theirs(ranked, pattern, first=0):
  ranks = {string: first + rank for rank, string in enumerate(ranked)}
  return pytest.importorskip("tiktoken").Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def tekken(ranked, **changes):
  entry = lambda rank, string: {"rank": rank, "token_bytes": base64.b64encode(string).decode(), "token_str": None}
  config = {"pattern": TEKKEN_SPLIT, "default_vocab_size": 600, "default_num_special_tokens": 20, "version": "v7"}
  special = [{"rank": rank, "token_str": mark, "is_control": True} for rank, mark in enumerate(MARKS)]
  values = {"config": config, "vocab": list(map(entry, range(len(ranked)), ranked)), "special_tokens": special}
  return values | changes


def opened(folder, values):
  (folder / "tekken.json").write_text(json.dumps(values))
  return load_tokenizer(folder)


def test_tekken(ranked, texts, tmp_path):
  """580 strings after 20 special tokens, of which 15 have no name of their own."""
  assert len(ranked) > 580
  tokenizer, reference = opened(tmp_path, tekken(ranked)), theirs(ranked[:580], TEKKEN_SPLIT, first=20)
  assert tokenizer.backend.get_vocab_size() == 600
  assert tokenizer.special == (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
  for text in texts:
    tokens = reference.encode_ordinary(text)
    assert tokenizer.encode(text, special=False) == tokens
    assert tokenizer.encode(text) == [1, *tokens]
    assert tokenizer.decode(tokens) == text
  for token in range(20, 600):  # a part of a character too
    assert tokenizer.decode([token]) == reference.decode([token])
  assert tokenizer.encode("[INST]a[/INST]<SPECIAL_5>", special=False) == [3, *reference.encode_ordinary("a"), 4, 5]


def test_a_tekken_that_names_no_special_tokens(ranked, tmp_path):
  """As of Mistral Nemo: there are 20 that go without saying."""
  values = tekken(ranked)
  del values["special_tokens"]
  tokenizer = opened(tmp_path, values)
  names = ["<pad>", "[IMG]", "[MIDDLE]", "[TOOL_CONTENT]"]
  assert [tokenizer.backend.token_to_id(name) for name in names] == [11, 10, 15, 19]
  assert tokenizer.special_id("pad_token") == 11


def test_tiktoken(ranked, texts, tmp_path):
  """Special tokens by the settings, which leave a gap."""
  lines = [base64.b64encode(string) + b" %d" % rank for rank, string in enumerate(ranked)]
  (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
  size = len(ranked)
  special = {"content": "<|end|>", "special": True, "normalized": False}
  settings = {"eos_token": "<|end|>", "added_tokens_decoder": {str(size + 2): special}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  tokenizer, reference = load_tokenizer(tmp_path), theirs(ranked, LLAMA_3_SPLIT)
  for text in texts:
    tokens = reference.encode_ordinary(text)
    assert tokenizer.encode(text) == tokens
    assert tokenizer.decode(tokens) == text
  assert tokenizer.encode("a<|end|>")[-1] == tokenizer.special_id("eos_token") == size + 2
  assert tokenizer.backend.id_to_token(size) == f"<|reserved_token_{size}|>"
  settings |= {"add_bos_token": True, "bos_token": "<|end|>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  assert load_tokenizer(tmp_path).encode("") == [size + 2]


def test_what_is_saved_reads_the_same(ranked, texts, tmp_path):
  tokenizer = opened(tmp_path, tekken(ranked))
  (tmp_path / "saved").mkdir()
  tokenizer.save(tmp_path / "saved")
  again = load_tokenizer(tmp_path / "saved")
  assert [again.encode(text) for text in texts[:20]] == [tokenizer.encode(text) for text in texts[:20]]


@pytest.mark.parametrize(
  ("changes", "why"),
  [
    ({"config": {}}, "it must have a config with a string 'pattern', and a list 'vocab'"),
    ({"vocab": None}, "a list 'vocab'"),
    ({"config": {"pattern": ".", "default_vocab_size": "many"}}, "its config has the invalid size 'many'"),
    ({"vocab": [{"token_bytes": "é"}]}, "the string of rank 0 is 'é', which is not base64"),
    ({"vocab": [3]}, "the string of rank 0 is None"),
    (
      {"config": {"pattern": ".", "default_num_special_tokens": 10**12}},
      "its config has the invalid size 1000000000000",
    ),
    ({"special_tokens": [{"rank": [0], "token_str": "<s>"}]}, "special_tokens are objects with 'rank' 0, 1"),
    ({"special_tokens": [{"rank": rank, "token_str": "<s>"} for rank in range(2)]}, "special_tokens are objects with"),
    ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "special_tokens are objects with 'rank' 0, 1"),
    ({"vocab": [{"token_bytes": "YQ=="}] * 2}, "some strings have two ranks\n  some bytes have no rank"),
    ({"config": {"pattern": "("}}, "pattern '('"),
  ],
)
def test_damage_is_told(ranked, tmp_path, changes, why):
  with pytest.raises(UserError) as raised:
    opened(tmp_path, tekken(ranked, **changes))
  assert why in str(raised.value)
  assert "tekken.json is not a tokenizer" in str(raised.value)


def test_damage_of_tiktoken_files_is_told(ranked, tmp_path):
  for text, why in (
    (b"YQ== 0\nYg== 2\n", "line 2: expected a base64 string and the rank 1"),
    (b"YQ== 0\n", "some bytes"),
  ):
    (tmp_path / "tokenizer.model").write_bytes(text)
    with pytest.raises(UserError, match=why):
      load_tokenizer(tmp_path)
