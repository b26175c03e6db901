"""Text as it comes: whole characters, exact stops, and the same however it is cut into pieces."""

import dataclasses

import numpy as np
import pytest
import tokenizers

import sa_jax
from sa_jax.decode import Detokenizer, Sampler, TextSettings, continue_texts, stream_text
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer():
  """Bytes as tokens, in GPT-2's manner, with a few merges and two special tokens."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = [("a", "b"), ("ab", "c"), ("Ċ", "Ċ"), ("Ġ", "a"), ("z", "Ã")]
  words = [*letters, *(left + right for left, right in merges)]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: number for number, word in enumerate(words)}, merges))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<end>", "<turn>"])
  return sa_jax.Tokenizer(backend)


TEXT = "abc déjà vu — 東京 🙂🙂 abab\n\nUser: x"


def pieces(tokenizer, tokens, stops=(), size=1):
  detokenizer = Detokenizer(tokenizer, stops)
  said = [detokenizer.push(tokens[at : at + size]) for at in range(0, len(tokens), size)]
  return [*said, detokenizer.finish()], detokenizer.stopped


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_join_to_the_text(tokenizer, size):
  tokens = tokenizer.encode(TEXT)
  said, stopped = pieces(tokenizer, tokens, size=size)
  assert "".join(said) == TEXT
  assert stopped is None
  assert not any("\ufffd" in piece for piece in said)
  assert len(tokens) > len(TEXT), "characters of several tokens are meant to be among them"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
  ("stops", "wanted"),
  [
    (("\n\nUser:",), "\n\nUser:"),  # across tokens
    (("bc",), "bc"),  # inside a token
    (("京 🙂",), "京 🙂"),  # across tokens that are no characters
    (("nothing", "abab", "ab\n"), "abab"),  # the one that begins first
    (("x", "User"), "User"),
    (("zz",), None),
    (("xy",), None),  # the text ends with its beginning
  ],
)
def test_a_stop_cuts_exactly(tokenizer, stops, wanted, size):
  said, stopped = pieces(tokenizer, tokenizer.encode(TEXT), stops, size)
  assert stopped == wanted
  assert "".join(said) == (TEXT if wanted is None else TEXT[: TEXT.index(wanted)])


def test_nothing_is_said_that_a_stop_takes_back(tokenizer):
  """What is held back is the shortest that may become a stop, and comes once it cannot."""
  detokenizer = Detokenizer(tokenizer, ["xxy"])
  said = [detokenizer.push(tokenizer.encode(letter)) for letter in "axxxxzxx"]
  assert said == ["a", "", "", "x", "x", "xxz", "", ""]
  assert detokenizer.finish() == "xx"


def test_a_stop_before_half_a_character_ends_at_once(tokenizer):
  half, rest = tokenizer.encode("zé")
  detokenizer = Detokenizer(tokenizer, ["z"])
  assert (detokenizer.push([half]), detokenizer.stopped) == ("", "z")
  assert pieces(tokenizer, [half, rest], ["zz"]) == (["", "zé", ""], None)


def test_special_tokens_are_stops_by_name_and_no_text(tokenizer):
  tokens = tokenizer.encode("ab<turn>c d<end>e")
  assert pieces(tokenizer, tokens)[0][-2:] == ["e", ""]
  assert "".join(pieces(tokenizer, tokens)[0]) == "abc de"
  said, stopped = pieces(tokenizer, tokens, ["<end>"])
  assert ("".join(said), stopped) == ("abc d", "<end>")


def test_half_a_character_comes_at_the_end(tokenizer):
  tokens = tokenizer.encode("é")
  assert pieces(tokenizer, tokens[:1]) == (["", "\ufffd"], None)


PROMPTS = ("abc", "d\n", "xyz")
HOW = TextSettings(max_new_tokens=12, sampler=Sampler(1.0, log_probs=True), seed=2, chunk=3)


@pytest.fixture(scope="module")
def model(tokenizer):
  return tiny.model("0:1", num_layers=2, vocab_size=tokenizer.backend.get_vocab_size(), max_length=256)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def plain(model, params, tokenizer):
  return continue_texts(model, params, tokenizer, PROMPTS, HOW)


class TestWithAModel:
  def test_texts_are_those_of_generate(self, model, params, tokenizer, plain):
    tokens, lengths = sa_jax.decode.right_pad([tokenizer.encode(prompt) for prompt in PROMPTS])
    out = sa_jax.generate(model, params, tokens, lengths, 12, seed=2, sampler=HOW.sampler)
    for text, row, log_probs in zip(plain, out.tokens, out.log_probs):
      assert text.tokens == row.tolist()
      assert text.text == tokenizer.decode(row)
      np.testing.assert_allclose(text.log_probs, log_probs, atol=1e-5)

  @pytest.mark.parametrize("slots", [1, 3])
  def test_a_stop_ends_one_text_and_harms_no_other(self, model, params, tokenizer, plain, slots):
    stop = tokenizer.decode(plain[0].tokens)[4:6]
    how = dataclasses.replace(HOW, stops=(stop,), slots=slots)
    found = continue_texts(model, params, tokenizer, PROMPTS, how)
    for text, whole in zip(found, plain):
      assert text.text == whole.text.split(stop)[0]
      assert text.stop == (stop if stop in whole.text else None)
      assert text.tokens == whole.tokens[: len(text.tokens)]
      assert len(text.log_probs) == len(text.tokens)
      # The stop is complete with the last token, and not before it.
      assert text.stop is None or (
        stop in tokenizer.decode(text.tokens) and stop not in tokenizer.decode(text.tokens[:-1])
      )
    assert len(found[0].tokens) < 12

  def test_a_stream_is_the_text(self, model, params, tokenizer, plain):
    stop = plain[0].text[4:6]
    for stops in ((), (stop,)):
      how = dataclasses.replace(HOW, stops=stops)
      said = list(stream_text(model, params, tokenizer, "abc", how))
      assert "".join(said) == (plain[0].text.split(stop)[0] if stops else plain[0].text)
    assert len(list(stream_text(model, params, tokenizer, "abc", HOW))) > 2


@pytest.mark.parametrize("stops", ["\n", ("",), (3,)])
def test_stops_are_strings(stops):
  with pytest.raises(sa_jax.UserError, match=r"generation: stops=.* \(must be a tuple.*\)"):
    TextSettings(stops=stops)
