"""Training data: chats as templates write them, and what of them is learnt."""

import dataclasses
import datetime
import json

import numpy as np
import pytest
import tokenizers

from sa_jax import Tokenizer, UserError
from sa_jax.train import data
from sa_jax.train.data import Reading, Report
from tests.train.texts import CHATML, END, MESSAGES, chat_tokenizer, texts, write


def test_chats_as_transformers_writes_them(tmp_path):
  """Ids of the whole chat against `apply_chat_template`; the assistant's turns, with their end, are learnt."""
  transformers = pytest.importorskip("transformers")

  tokenizer = chat_tokenizer()
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, chat_template=CHATML)
  rows = [{"messages": MESSAGES}, {"instruction": "Hi", "input": "you", "output": "Ho"}]
  corpus = data.open_corpus([write(tmp_path / "a.jsonl", *rows)], tokenizer)
  alpaca = [{"role": "user", "content": "Hi\n\nyou"}, {"role": "assistant", "content": "Ho"}]
  expected = [theirs.apply_chat_template(chat, tokenize=True)["input_ids"] for chat in (MESSAGES, alpaca)]
  np.testing.assert_array_equal(corpus.tokens, np.concatenate(expected))
  assert texts(corpus, tokenizer)[0] == (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    "[Hello, naïve 🙂 one<|im_end|>\n]<|im_start|>user\nAnd?<|im_end|>\n"
    "<|im_start|>assistant\n[That is\nall.<|im_end|>\n]"
  )


WITH_TOOLS = (
  "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
  "{% if think is false %}<no>{% endif %}{{ m.content }}|{% endfor %}"
)


def test_tools_of_chats_as_transformers_writes_them(tmp_path):
  """Also where a table holds them as JSON in a text; the template's other variables are the object's too."""
  transformers = pytest.importorskip("transformers")
  tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
  tokenizer = dataclasses.replace(chat_tokenizer(), chat_template=WITH_TOOLS)
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, chat_template=WITH_TOOLS)
  rows = [{"messages": MESSAGES, "tools": tools, "chat_template_kwargs": {"think": False}}, {"messages": MESSAGES}]
  rows.append({name: json.dumps(value) if name != "messages" else value for name, value in rows[0].items()})
  corpus = data.open_corpus([write(tmp_path / "a.jsonl", *rows)], tokenizer)
  with_tools = theirs.apply_chat_template(MESSAGES, tools, think=False, tokenize=True)["input_ids"]
  plain = theirs.apply_chat_template(MESSAGES, tokenize=True)["input_ids"]
  assert len(with_tools) > len(plain)
  np.testing.assert_array_equal(corpus.tokens, [*with_tools, *plain, *with_tools])


THINKING = (
  "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
  "{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>"
  "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}{{ m.content }}<e>{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)


MARKED = (
  "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<e>"
  "{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
)


def of_chats(tmp_path, template: str, *chats) -> list[str]:
  """What is learnt of chats, in brackets."""
  tokenizer = Tokenizer(data.byte_tokenizer().backend, template)
  file = write(tmp_path / "a.jsonl", *({"messages": chat} for chat in chats))
  return texts(data.open_corpus([file], tokenizer), tokenizer)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
  names = ("user", "assistant")
  return [{"role": role, "content": content} for pair in pairs for role, content in zip(names, pair)]


def test_a_template_that_writes_the_newest_turn_otherwise(tmp_path):
  """Each answer is learnt once, as the model will write it; two in a row that agree share a document."""
  asked = [*turns(("a", "b")), {"role": "assistant", "content": "c"}, *turns(("d", "f"))]
  assert of_chats(tmp_path, THINKING, turns(("q", "r")), asked) == [
    "<user>q<e><assistant>[<think></think>r<e>]",
    "<user>a<e><assistant>[<think></think>b<e>]<assistant>[<think></think>c<e>]",
    "<user>a<e><assistant>b<e><assistant>c<e><user>d<e><assistant>[<think></think>f<e>]",
  ]


def test_an_opening_that_is_another_than_what_is_asked_with(tmp_path):
  """As DeepSeek-R1's, whose prompt ends with an open thought that no answer in a chat has."""
  template = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
  )
  assert of_chats(tmp_path, template, turns(("q", "r"))) == ["<user>q<assistant>[r]"]
  with pytest.raises(ValueError, match="line 1: the chat template changes the text before message 1"):
    of_chats(tmp_path, "{{ messages | length }}" + template, turns(("q", "r")))


def test_a_template_that_marks_what_the_assistant_says(tmp_path):
  """Against the mask that transformers makes of the same template."""
  transformers = pytest.importorskip("transformers")

  chat = turns(("q", "r"), ("s", "naïve"))
  assert of_chats(tmp_path, MARKED, chat) == ["<user>q|<assistant>[r<e>]|<user>s|<assistant>[naïve<e>]|"]
  tokenizer = data.byte_tokenizer()
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, chat_template=MARKED)
  expected = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
  corpus = data.open_corpus([tmp_path / "a.jsonl"], Tokenizer(tokenizer.backend, MARKED))
  np.testing.assert_array_equal(corpus.tokens, expected["input_ids"])
  np.testing.assert_array_equal(corpus.trained, expected["assistant_masks"])


def test_marks_inside_a_macro_are_found_otherwise(tmp_path):
  """Where they have no place in the text, turns are told apart as without marks."""
  template = (
    "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ say(m) if m.role == 'assistant' else m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
  )
  assert of_chats(tmp_path, template, turns(("q", "r"), ("s", "t"))) == ["<user>q<assistant>[r]<user>s<assistant>[t]"]


def test_a_start_token_that_is_also_the_end_token(tmp_path):
  """As GPT-2's: the start is read, the end is learnt."""
  backend = data.byte_tokenizer().backend
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)]
  )
  tokenizer = Tokenizer(backend, None, (("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>")))
  corpus = data.open_corpus([write(tmp_path / "a.jsonl", {"text": "ab"})], tokenizer)
  assert corpus.tokens.tolist() == [END, ord("a"), ord("b"), END]
  assert corpus.trained.tolist() == [False, True, True, True]


QUESTION = '{"role": "user", "content": "q"}'


@pytest.mark.parametrize(
  ("line", "why"),
  [
    (r'{"text": "a \ud83d"}', "the text is not Unicode: character 2 is half of a surrogate pair"),
    (r'{"prompt": "a", "completion": "\udc00"}', "character 1 is half of a surrogate pair"),
    (r'{"messages": [%s, {"role": "assistant", "content": "\ud83d"}]}', "is half of a surrogate pair"),
    ('{"messages": [%s, {"role": "assistant", "content": null}]}', "has no attribute 'content'"),
    ('{"messages": [%s, {"role": "assistant", "content": [{"text": "x"}]}]}', "TypeError: can only concatenate str"),
    ('{"messages": [%s, {"role": "assistant", "content": 7}]}', "TypeError: can only concatenate str"),
    ('{"messages": [{"role": null, "content": "q"}, {"role": "assistant", "content": "a"}]}', "no attribute 'role'"),
    ('{"messages": null}', "'messages' is not a list"),
    ('{"messages": []}', "there is no assistant message"),
    ('{"instruction": "a", "input": "", "output": 3}', "'output' is int; must be a non-empty string"),
    ('{"text": NaN}', "'text' is float; must be a non-empty string"),
    ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "x"}', "'tools' is a string that is not JSON"),
    ('{"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}', "tools must be a list of objects"),
    ('{"messages": [{"role": "assistant"}], "chat_template_kwargs": [1]}', "_kwargs' is list; must be an object"),
    ('{"messages": [{"role": "assistant"}], "chat_template_kwargs": {"messages": []}}', "pass messages"),
    ('{"text": %s}' % ("[" * 99_999 + "]" * 99_999), "recursion"),
  ],
)  # fmt: skip
def test_lines_that_cannot_be_used(tmp_path, line, why):
  """One line that names the place, or one more that is left out; never anything else."""
  template = CHATML.replace(
    "{{ message['role'] }}\n{{ message['content'] }}", "{{ message['role'] + message['content'] }}"
  )
  tokenizer = Tokenizer(data.byte_tokenizer().backend, template)
  file = write(tmp_path / "a.jsonl", {"text": "good"}, line.replace("%s", QUESTION) + "\n")
  with pytest.raises(UserError, match=f"a.jsonl, line 2: .*{why}.*skip_bad=True"):
    data.open_corpus([file], tokenizer)
  assert data.open_corpus([file], tokenizer, Reading(skip_bad=True)).report == Report(documents=1, bad=1)


def test_nothing_as_tables_write_it(tmp_path):
  """Null where a key is absent."""
  lines = [{"instruction": "Hi.", "input": given, "output": "Ho"} for given in ("", None)]
  tokenizer = data.byte_tokenizer()
  first, second = texts(data.open_corpus([write(tmp_path / "a.jsonl", *lines)], tokenizer), tokenizer)
  assert first == second


def test_the_cache_knows_the_date_where_a_template_writes_it(tmp_path):
  reading = Reading(cache=tmp_path / "cache")
  file = write(tmp_path / "a.jsonl", {"messages": turns(("q", "r"))})
  found = {}
  for day in (1, 2):
    for name, template in (("plain", MARKED), ("dated", "{{ strftime_now('%d') }}" + MARKED)):
      now = datetime.datetime(2025, 1, day)
      tokenizer = Tokenizer(data.byte_tokenizer().backend, template, now=now)
      found[name, day] = texts(data.open_corpus([file], tokenizer, reading), tokenizer)[0]
  assert found["plain", 1] == found["plain", 2] == "<user>q|<assistant>[r<e>]|"
  assert found["dated", 1] == "01" + found["plain", 1]
  assert found["dated", 2] == "02" + found["plain", 1]
  assert len(list(reading.cache.iterdir())) == 3
