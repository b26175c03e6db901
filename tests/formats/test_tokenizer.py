"""Tokenizers: text to tokens and back, special tokens, chat templates, and damage."""

import json
import logging
import re
import time

import pytest
import tokenizers
from tokenizers import Regex, decoders, normalizers

import sa_jax
from sa_jax import Tokenizer, UserError
from tests import tiny

TEXTS = ["Hello, world!", "  two  spaces\n\nand 1234 lines ", "naïve café — 日本語 🙂", "don't they're I'll", ""]
TEMPLATE = (
  "{% for message in messages %}{{ bos_token }}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def tokenizer() -> Tokenizer:
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(["<s>"])
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  return Tokenizer(backend, TEMPLATE, (("bos_token", "<s>"),))


def test_encode_and_decode(tokenizer):
  assert tokenizer.encode("a b") == [0, 1, 2]
  assert tokenizer.encode("a b", special=False) == [1, 2]
  assert tokenizer.decode([0, 1, 2]) == "a b"
  assert tokenizer.decode([0, 1, 2], special=True) == "<s> a b"


def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  loaded = sa_jax.load_tokenizer(tmp_path)
  assert loaded.backend.to_str() == tokenizer.backend.to_str()
  assert (loaded.chat_template, loaded.special) == (tokenizer.chat_template, tokenizer.special)


def test_chat(tokenizer):
  messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
  assert tokenizer.chat(messages) == "<s>system: Be brief.\n<s>user: Hi\nassistant:"
  assert tokenizer.chat(messages, prompt=False) == "<s>system: Be brief.\n<s>user: Hi\n"


def test_what_it_was_last_called_with_is_forgotten(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  changed = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  changed.enable_truncation(3)
  changed.enable_padding(length=8)
  changed.save(str(tmp_path / "tokenizer.json"))
  assert sa_jax.load_tokenizer(tmp_path).encode("a b a b a") == [0, 1, 2, 1, 2, 1]


@pytest.mark.parametrize(
  "template",
  [
    "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %} {% endfor %}{{ bos_token }}",
    "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}TEXTS{% endif %}{{ messages | tojson }}",
  ],
)
def test_templates_are_rendered_as_transformers_renders_them(tokenizer, template):
  PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast

  messages = [{"role": "user", "content": "<é> & 'x'"}, {"role": "assistant", "content": "no"}]
  theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, bos_token="<s>", chat_template=template)
  expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  assert Tokenizer(tokenizer.backend, template, tokenizer.special).chat(messages) == expected


def test_tokens_that_only_the_settings_list(tokenizer, tmp_path):
  PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast

  tokenizer.save(tmp_path)
  options = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
  values = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"4": {"content": "<end>"} | options}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
  expected = PreTrainedTokenizerFast.from_pretrained(tmp_path)("a<end> b")["input_ids"]
  assert sa_jax.load_tokenizer(tmp_path).encode("a<end> b") == expected == [0, 1, 4, 2]
  values["added_tokens_decoder"]["7"] = values["added_tokens_decoder"].pop("4")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
  with pytest.raises(ValueError, match="gives '<end>' the id 7, but tokenizer.json gives it 4"):
    sa_jax.load_tokenizer(tmp_path)


def test_roles_of_an_older_file(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ bos_token }}", "eos_token": null}')
  (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "b"}}')
  loaded = sa_jax.load_tokenizer(tmp_path)
  assert loaded.chat([]) == "<s>"
  assert (loaded.special_id("bos_token"), loaded.special_id("eos_token"), loaded.special_id("pad_token")) == (
    0,
    2,
    None,
  )


def test_template_in_its_own_file(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
  assert sa_jax.load_tokenizer(tmp_path).chat([{"role": "user", "content": "Hi"}]) == "Hi"


def test_spelling_of_older_folders(tokenizer, tmp_path):
  """Special tokens as objects, several templates by name."""
  tokenizer.save(tmp_path)
  values = {
    "bos_token": {"content": "<s>", "lstrip": False},
    "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}"}],
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
  loaded = sa_jax.load_tokenizer(tmp_path)
  assert loaded.special == (("bos_token", "<s>"),)
  assert loaded.chat([]) == "<s>"


def test_a_damaged_tokenizer_travels_with_a_warning(tmp_path, caplog):
  model = tiny.model("0:1", num_layers=2)
  sa_jax.save(tmp_path / "model", model, tiny.params(model))
  (tmp_path / "model" / "tokenizer.json").write_text("{} or not")
  with caplog.at_level(logging.WARNING, "sa_jax"):
    sa_jax.convert(tmp_path / "model", tmp_path / "made")
  (said,) = (record.getMessage() for record in caplog.records)
  assert re.search(r"model/tokenizer.json is not a tokenizer: .*; the tokenizer is copied as it is$", said)
  assert (tmp_path / "made" / "tokenizer.json").read_text() == "{} or not"


def test_refused(tokenizer, tmp_path):
  with pytest.raises(ValueError, match="there is no tokenizer.json in"):
    sa_jax.load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
    sa_jax.load_tokenizer(tmp_path)
  with pytest.raises(ValueError, match="this model has no chat template: it takes plain text, not messages"):
    Tokenizer(tokenizer.backend).chat([])
  rejecting = Tokenizer(tokenizer.backend, "{{ raise_exception('roles must alternate') }}")
  with pytest.raises(ValueError, match="the chat template rejects these messages: roles must alternate"):
    rejecting.chat([])
  with pytest.raises(ValueError, match="the chat template rejects these messages"):
    Tokenizer(tokenizer.backend, "{% if %}").chat([])
  with pytest.raises(ValueError, match="the chat template rejects these messages"):
    Tokenizer(tokenizer.backend, "{{ ''.__class__.__mro__ }}").chat([])


def test_damaged_settings(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(ValueError, match="tokenizer_config.json is not readable JSON"):
    sa_jax.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  ("settings", "why"),
  [
    ({"added_tokens_decoder": [1]}, r"added_tokens_decoder of tokenizer_config.json: it is \[1\]; must be an object"),
    ({"added_tokens_decoder": 3}, "it is 3; must be an object"),
    (
      {"added_tokens_decoder": {"4": {"special": True}}},
      "'4' is {'special': True}; must be a token id and an object with a string",
    ),
    ({"added_tokens_decoder": {"4": None}}, "'4' is None; must be a token id and an object"),
    ({"added_tokens_decoder": {"4": ["<end>"]}}, r"'4' is \['<end>'\]; must be a token id and an object"),
    ({"added_tokens_decoder": {"4": {"content": 7}}}, "'4' is {'content': 7}; must be a token id and an object"),
    (
      {"added_tokens_decoder": {"x": {"content": "<end>"}}},
      "'x' is {'content': '<end>'}; must be a token id and an object",
    ),
    (
      {"added_tokens_decoder": {"4": {"content": "<end>", "special": "yes"}}},
      "'4' is .*; must be a token id and an object",
    ),
    ({"added_tokens_decoder": {str(2**70): {"content": "<end>"}}}, "gives '<end>' the id 1180591620717411303424"),
    ({"bos_token": ["<s>"]}, r"bos_token is \['<s>'\]; must be a string, or an object with a string 'content'"),
    (
      {"bos_token": 3, "eos_token": {"lstrip": True}},
      "bos_token is 3; .*\n  eos_token is {'lstrip': True}; must be a string",
    ),
    ({"chat_template": 5}, "chat_template is 5; must be a string"),
    ({"chat_template": ["x"]}, r"chat_template is \['x'\]; must be objects with 'name' and 'template'"),
    ({"chat_template": [{"template": "x"}]}, "must be objects with 'name' and 'template'"),
    ({"chat_template": [{"name": "default", "template": 1}]}, "chat_template is 1; must be a string"),
  ],
)
def test_malformed_settings(tokenizer, tmp_path, settings, why):
  tokenizer.save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  with pytest.raises(UserError, match=why):
    sa_jax.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  ("name", "part", "growth"),
  [
    ("normalizer", normalizers.Replace("a", "b" * 100_000), "100,000"),
    ("normalizer", normalizers.Replace(Regex("x*"), "b" * 5000), "5,001"),
    ("normalizer", normalizers.Sequence([normalizers.Replace("a", "aaaaaaaaaa")] * 9), "1,000,000,000"),
    ("normalizer", normalizers.Precompiled(b"\x04\0\0\0abcdx\0" + b"y" * 2000 + b"\0"), "2,000"),
    ("decoder", decoders.Replace("a", "b" * 100_000), "100,000"),
  ],
)
def test_a_tokenizer_that_multiplies_its_input(tokenizer, tmp_path, name, part, growth):
  """Refused when it is opened, before a text meets it."""
  setattr(tokenizer.backend, name, part)
  tokenizer.save(tmp_path)
  began = time.monotonic()
  with pytest.raises(UserError, match=rf"tokenizer.json: its {name} can expand one character to {growth}"):
    sa_jax.load_tokenizer(tmp_path)
  assert time.monotonic() - began < 5


def test_normalisers_of_models_are_taken(tokenizer, tmp_path):
  """ALBERT's and Llama's."""
  replacements = [normalizers.Replace("``", '"'), normalizers.Replace(Regex(" {2,}"), " ")]
  unicode = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Prepend("▁")]
  tokenizer.backend.normalizer = normalizers.Sequence([*replacements, *unicode, normalizers.Replace(" ", "▁")])
  tokenizer.save(tmp_path)
  assert sa_jax.load_tokenizer(tmp_path).encode("B") == [0, 3]


def test_what_stands_around_a_text(tokenizer):
  """A start token that is also the end token is told apart by its place."""
  assert tokenizer.around == ([0], [])
  template = tokenizers.processors.TemplateProcessing
  for single, expected in (("<s> $A <s>", ([0], [0])), ("$A <s>", ([], [0])), ("$A", ([], []))):
    tokenizer.backend.post_processor = template(single=single, special_tokens=[("<s>", 0)])
    assert Tokenizer(tokenizer.backend).around == expected


def test_half_a_surrogate_pair(tokenizer):
  with pytest.raises(UserError, match="the text is not Unicode: character 2 is half of a surrogate pair"):
    tokenizer.encode(json.loads('"a \\ud83d b"'))


@pytest.fixture(scope="module")
def smol_tokenizer(smollm2) -> Tokenizer:
  return sa_jax.load_tokenizer(smollm2)


@pytest.mark.real_model
class TestSmolLM2:
  @pytest.mark.parametrize("text", TEXTS)
  def test_round_trip(self, smol_tokenizer, text):
    assert smol_tokenizer.decode(smol_tokenizer.encode(text)) == text

  def test_literal(self, smol_tokenizer):
    """Digits stand alone; a space belongs to the word after it."""
    pieces = [smol_tokenizer.backend.id_to_token(token) for token in smol_tokenizer.encode("The year 1984.")]
    assert pieces == ["The", "Ġyear", "Ġ", "1", "9", "8", "4", "."]

  def test_special_tokens(self, smol_tokenizer):
    assert smol_tokenizer.encode("<|im_start|>user<|im_end|>")[::2] == [1, 2]
    assert smol_tokenizer.decode([1, 2]) == ""
    assert smol_tokenizer.decode([1, 2], special=True) == "<|im_start|><|im_end|>"

  def test_chat(self, smol_tokenizer):
    text = smol_tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")

  def test_saved(self, smol_tokenizer, tmp_path):
    smol_tokenizer.save(tmp_path)
    loaded = sa_jax.load_tokenizer(tmp_path)
    assert [loaded.encode(text) for text in TEXTS] == [smol_tokenizer.encode(text) for text in TEXTS]
    assert loaded.chat_template == smol_tokenizer.chat_template
    assert dict(loaded.special) == dict(smol_tokenizer.special)
