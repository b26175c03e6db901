"""SentencePiece's tokenizers inside GGUF files, against SentencePiece itself."""

import io
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import sa_jax
from tests import tiny
from tests.formats.test_gguf import write_gguf

TEXT = Path(sa_jax.__file__).with_name("plan.py").read_text(encoding="utf-8")
FIXED = [
  "",
  "a",
  "  two  spaces\n\nand 1234 lines ",
  "naïve café — 日本語 🙂",
  "aaaaaaa ababab",
  "\tdef f(x):\n  return x",
]


@pytest.fixture(scope="module")
def spm():
  """Trained as Llama 2's: BPE, byte fallback, digits apart, nothing normalised, a space before a text."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="bpe", vocab_size=600, byte_fallback=True,
    split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    user_defined_symbols=["[end]"], minloglevel=2,
  )  # fmt: skip
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def fields(spm, writer, **changes):
  """What llama.cpp's converter writes of a SentencePiece model."""
  ids = range(spm.vocab_size())
  own = spm.piece_to_id("[end]")
  kind = lambda i: 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 4 if i == own else 1
  writer.add_tokenizer_model("llama")
  last = changes.pop("last", spm.id_to_piece(ids[-1]))
  writer.add_token_list([*(spm.id_to_piece(i) for i in ids[:-1]), last])
  writer.add_token_scores(changes.pop("scores", [spm.get_score(i) for i in ids]))
  writer.add_token_types([kind(i) for i in ids])
  writer.add_unk_token_id(changes.pop("unknown", spm.unk_id()))
  for name, value in changes.items():
    getattr(writer, name)(value)


@pytest.fixture(scope="module")
def write(spm, tmp_path_factory):
  config = dict(num_layers=1, vocab_size=spm.vocab_size(), norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2,))
  model = tiny.model("dense", **config)
  params = tiny.params(model)

  def call(**changes) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, model, params, change=lambda writer: fields(spm, writer, **changes))

  return call


@pytest.fixture(scope="module")
def tokenizer(write):
  return sa_jax.load_tokenizer(write())


@pytest.mark.parametrize("text", [*FIXED, TEXT], ids=range(len(FIXED) + 1))
def test_tokens_and_text_are_sentencepiece_s(spm, tokenizer, text):
  assert tokenizer.encode(text) == [spm.bos_id(), *spm.encode(text)]
  assert tokenizer.decode(spm.encode(text)) == spm.decode(spm.encode(text)) == text


# No "<": control tokens in a text are control tokens to us.
@settings(max_examples=200, deadline=None)
@given(
  st.lists(st.sampled_from([*"abcdefin rst_(),.:=\n12é日🙂", "  ", "self", "plan", "[en"]), max_size=40).map("".join)
)
def test_any_text(spm, tokenizer, text):
  assert tokenizer.encode(text, special=False) == spm.encode(text)


def test_what_the_file_says_is_put_around_a_text(spm, write):
  tokenizer = sa_jax.load_tokenizer(write(add_add_bos_token=False, add_add_eos_token=True, add_add_space_prefix=False))
  assert tokenizer.encode("self") == [spm.piece_to_id("self"), spm.eos_id()]
  assert tokenizer.decode(tokenizer.encode(" self")) == " self"


def test_tokens_that_are_found_whole(spm, tokenizer):
  assert tokenizer.encode("self[end]") == [spm.bos_id(), *spm.encode("self[end]")]
  assert tokenizer.encode("self</s>", special=False) == [spm.piece_to_id("▁self"), spm.eos_id()]
  assert tokenizer.decode(tokenizer.encode("self[end]</s>")) == "self[end]"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  assert sa_jax.load_tokenizer(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)


def test_chat_templates_have_names(write):
  named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
  found = sa_jax.load_tokenizer(write(add_chat_template=named))
  assert (found.chat([]), found.chat([], tools=[])) == ("D", "T0")


def test_a_converted_file_keeps_its_tokenizer(write, tokenizer, tmp_path):
  sa_jax.convert(write(), tmp_path / "out")
  assert sa_jax.load_tokenizer(tmp_path / "out").encode(TEXT) == tokenizer.encode(TEXT)


def test_a_piece_of_a_hundred_thousand_characters(spm, write):
  """All ways to cut it would be 10 GB of text."""
  path = write(last="x" * 100_000)
  began = time.monotonic()
  tokenizer = sa_jax.load_tokenizer(path)
  assert time.monotonic() - began < 5
  assert tokenizer.encode("self", special=False) == spm.encode("self")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"scores": [0.0, 0.0, 0.0]}, "one entry per token, not 600 tokens, 3 scores, 600 token_type"),
    ({"unknown": 600}, "tokenizer.ggml.unknown_token_id is 600, but there are 600 tokens"),
  ],
)
def test_damage(write, changes, message):
  path = write(**changes)
  with pytest.raises(ValueError, match=message):
    sa_jax.load_tokenizer(path)


class TestTokenizerModel:
  """A folder whose only tokenizer is SentencePiece's own file."""

  @pytest.fixture
  def folder(self, spm, tmp_path):
    pytest.importorskip("google.protobuf")
    (tmp_path / "tokenizer.model").write_bytes(spm.serialized_model_proto())
    return tmp_path

  @pytest.mark.parametrize("text", [*FIXED, TEXT], ids=range(len(FIXED) + 1))
  def test_tokens_and_text_are_sentencepiece_s(self, spm, folder, text):
    tokenizer = sa_jax.load_tokenizer(folder)
    assert tokenizer.encode(text) == [spm.bos_id(), *spm.encode(text)]
    assert tokenizer.decode(spm.encode(text)) == text
    assert dict(tokenizer.special)["eos_token"] == "</s>"

  def test_settings(self, spm, folder):
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    assert sa_jax.load_tokenizer(folder).encode("self") == [*spm.encode("self"), spm.eos_id()]
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<start>"}')
    with pytest.raises(ValueError, match="has no '<start>', which its settings add to texts"):
      sa_jax.load_tokenizer(folder)

  def test_another_model(self, folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="unigram", vocab_size=200, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="it is not BPE") as caught:
      sa_jax.load_tokenizer(folder)
    assert "it rewrites characters (nmt_nfkc)" in str(caught.value)

  def test_damage(self, folder):
    (folder / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
      sa_jax.load_tokenizer(folder)


@pytest.mark.parametrize(("changes", "start"), [({}, [256]), ({"add_add_bos_token": False}, [])])
def test_llama_3_s_texts_start_with_the_start_token(tmp_path, changes, start):
  """As in llama.cpp, where the file does not say otherwise."""
  tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|begin_of_text|>", "ab"]

  def change(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 256 + [3, 1])
    for name, value in changes.items():
      getattr(writer, name)(value)

  model = tiny.model("dense", num_layers=2, vocab_size=258, bos_token_id=256, eos_token_ids=(0,))
  path = write_gguf(tmp_path / "model.gguf", model, tiny.params(model), change=change)
  assert sa_jax.load_tokenizer(path).encode("ab") == [*start, 257]
