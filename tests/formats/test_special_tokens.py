"""Special tokens, from wherever a tokenizer's folder names them: as transformers' AutoTokenizer reads them."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from sa_jax import UserError, load_tokenizer
from sa_jax.formats.special_tokens import read_settings

TEXTS = [
  "hello <s> <img> world", "a<img>b <|tool|> c <pad> <extra>", "</s><one><two> <new>x", "the fox hello <|tool|>",
  " <img>  <s> hello  <extra>\n", "",
]  # fmt: skip
SIZE = 256 + 3 + 2


@pytest.fixture(scope="module")
def backend():
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [("f", "o"), ("fo", "x"), ("h", "i")]
  vocabulary = {token: index for index, token in enumerate([*letters, *map("".join, merges)])}
  made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
  assert made.get_vocab_size() == SIZE
  return made


def written(backend, folder, config, others):
  backend.save(str(folder / "tokenizer.json"))
  files = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **config}, **others}
  for name, values in files.items():
    (folder / name).write_text(json.dumps(values))
  return folder


def token(content, **flags):
  plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
  return {"content": content, **plain, "special": True, **flags}


def by_number(*tokens):
  """The list that begins with the start token's number."""
  return {"added_tokens_decoder": {str(SIZE - 2 + index): each for index, each in enumerate(tokens)}}


MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
CASES = {
  "nothing": ({}, {}),
  "roles": ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, {}),
  "roles of the map": ({}, {MAP: {"bos_token": "<s>", "pad_token": token("<pad>", lstrip=True)}}),
  "the map comes last": ({"eos_token": "<one>"}, {MAP: {"eos_token": "<two>"}}),
  "but not beside a list by number": (
    {"eos_token": "</s>", "added_tokens_decoder": {str(SIZE): token("<new>")}},
    {MAP: {"eos_token": "<two>", "pad_token": "<pad>"}, ADDED: {"<img>": SIZE + 1}},
  ),
  "additional": ({"additional_special_tokens": ["<img>", "<|tool|>"]}, {}),
  "extra": ({"extra_special_tokens": ["<img>", "<|tool|>"], "additional_special_tokens": ["<extra>"]}, {}),
  "extra by name": ({"extra_special_tokens": {"image_token": "<img>", "tool_token": "<|tool|>"}}, {}),
  "additional of the map": ({}, {MAP: {"additional_special_tokens": ["<img>", "<extra>"]}}),
  "extra of both": ({"extra_special_tokens": ["<|tool|>"]}, {MAP: {"extra_special_tokens": ["<img>", "<|tool|>"]}}),
  "other names": ({"image_token": "<img>", "add_bos_token": True, "video_token": None}, {}),
  "added": ({}, {ADDED: {"<img>": SIZE, "<|tool|>": SIZE + 1}}),
  "added, special": (
    {"eos_token": "<img>"},
    {MAP: {"additional_special_tokens": ["<|tool|>"]}, ADDED: {"<img>": SIZE, "<|tool|>": SIZE + 1}},
  ),
  "other flags": (by_number(token("<s>", special=False, lstrip=True), token("</s>"), token("<img>", rstrip=True)), {}),
  "a role makes special": (
    {"eos_token": "<img>"} | by_number(token("<s>"), token("</s>"), token("<img>", special=False)),
    {},
  ),
  "words of the vocabulary": ({"eos_token": "hi", "extra_special_tokens": ["fox"]}, {}),
  "a role's flags": ({"eos_token": token("<img>", __type="AddedToken", lstrip=True)}, {}),
  "split": ({"split_special_tokens": True, "eos_token": "</s>"}, {}),
  "nulls": ({"bos_token": None, "extra_special_tokens": None, "eos_token": "</s>"}, {MAP: {"eos_token": None}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_as_transformers_reads_them(backend, tmp_path, name):
  transformers = pytest.importorskip("transformers")
  folder = written(backend, tmp_path, *CASES[name])
  ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
  assert dict(ours.special) == theirs.special_tokens_map
  for text in TEXTS:
    tokens = theirs(text)["input_ids"]
    assert ours.encode(text) == tokens
    for special in (True, False):
      assert ours.decode(tokens, special=special) == theirs.decode(tokens, skip_special_tokens=not special)
  assert len(theirs) == ours.backend.get_vocab_size()


@pytest.mark.parametrize("split", [False, True])
def test_what_is_saved_reads_the_same(backend, tmp_path, split):
  config = {"extra_special_tokens": {"image_token": "<img>"}, "eos_token": "</s>", "pad_token": "<pad>"}
  config |= {"split_special_tokens": split}
  read = load_tokenizer(written(backend, tmp_path, config, {}))
  (tmp_path / "saved").mkdir()
  read.save(tmp_path / "saved")
  again = load_tokenizer(tmp_path / "saved")
  assert (
    dict(again.special) == dict(read.special) == {"eos_token": "</s>", "pad_token": "<pad>", "image_token": "<img>"}
  )
  assert [again.encode(text) for text in TEXTS] == [read.encode(text) for text in TEXTS]


def test_objects_in_lists_are_read_as_older_files_have_them(backend, tmp_path):
  """transformers 4 wrote them, and transformers 5 fails on them."""
  folder = written(backend, tmp_path, {}, {MAP: {"additional_special_tokens": [token("<img>", rstrip=True)]}})
  assert load_tokenizer(folder).encode("a<img> b") == [*load_tokenizer(folder).encode("a"), SIZE, ord("b") - 33]


@pytest.mark.parametrize(
  ("config", "others", "why"),
  [
    (
      {"extra_special_tokens": [1]},
      {},
      "extra_special_tokens has 1; must be a string, or an object with a string 'content'",
    ),
    ({"extra_special_tokens": "<img>"}, {}, "extra_special_tokens is '<img>'; must be a list or an object"),
    (
      {"extra_special_tokens": {"image_token": 3}},
      {},
      "image_token is 3; must be a string, or an object with a string",
    ),
    ({"eos_token": token("<img>", lstrip="yes")}, {}, "eos_token is {'content': '<img>', 'lstrip': 'yes'"),
    ({"extra_special_tokens": [token("<img>", rstrip=1)]}, {}, "extra_special_tokens has {'content': '<img>'"),
    ({"added_tokens_decoder": {"9" * 5000: token("<img>")}}, {}, "'999999"),
    ({}, {ADDED: {"<img>": SIZE + 5}}, f"gives '<img>' the id {SIZE + 5}, but tokenizer.json gives it {SIZE}"),
    ({}, {ADDED: {"<img>": "x"}}, "'x' is {'content': '<img>'"),
    ({}, {MAP: [1]}, "special_tokens_map.json must contain a JSON object"),
  ],
)
def test_damage_is_one_line(backend, tmp_path, config, others, why):
  with pytest.raises(UserError) as raised:
    load_tokenizer(written(backend, tmp_path, config, others))
  assert why in str(raised.value)
  assert "\n" not in str(raised.value)


def test_settings_of_an_empty_folder(tmp_path):
  assert read_settings(tmp_path) == {}
