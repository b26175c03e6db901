"""Chat templates: as transformers renders them, in bounded time and memory, whatever the messages hold."""

import datetime
import json
import resource
import time

import pytest

from sa_jax import Tokenizer, UserError
from sa_jax.formats import chat_template
from sa_jax.formats.chat_template import Call, Template
from sa_jax.train.data import byte_tokenizer

PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "<sep>", "unk_token": "<unk>"}
USER = {"role": "user", "content": "hi"}


def theirs(template: str, messages, **options) -> str:
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend, chat_template=template, **SPECIAL)
  return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def ours(template: str) -> Tokenizer:
  return Tokenizer(byte_tokenizer().backend, template, tuple(SPECIAL.items()))


@pytest.mark.parametrize(
  ("template", "answer"),
  [
    (CHATML, {"content": "yo", "name": None, "tool_calls": None}),
    (CHATML.replace("m['content']", "m['content'] | trim"), {"content": None}),
    (CHATML.replace("m['content']", "m['content'] | trim"), {"content": 5}),
    (CHATML.replace("m['content']", "m.content | tojson"), {"content": [{"type": "text", "text": "<é>"}]}),
    ("{% for m in messages %}{{ 'name' in m and m.name[0] }}|{% endfor %}", {"name": None}),
    ("{% for m in messages %}{{ m.name is defined }}{{ sep_token }}{{ unk_token }}{% endfor %}", {"name": None}),
    ("{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}{% endfor %}", {"reasoning": "hm"}),
    ("{% set ns = namespace(x=1) %}{% set ns.x = dict(a=2) %}{{ ns.x.a }}{{ [1, 2] | tojson(indent=2) }}", {}),
    (CHATML, {"content": json.loads('"\\ud83d"')}),
  ],
  ids=["nulls", "no content", "number", "parts", "in", "defined", "reasoning", "namespace", "surrogate"],
)  # fmt: skip
def test_as_transformers_renders(template, answer):
  messages = [USER, {"role": "assistant"} | answer]
  assert ours(template).chat(messages, prompt=False) == theirs(template, messages)


@pytest.mark.parametrize(
  ("template", "answer", "why"),
  [
    (CHATML, {"content": None}, "has no attribute 'content'"),
    (CHATML, {}, "has no attribute 'content'"),
    (CHATML, {"content": ["x"]}, "TypeError: can only concatenate str"),
    (CHATML, {"content": 5}, "TypeError: can only concatenate str"),
    ("{{ 1 / 0 }}", {}, "ZeroDivisionError: division by zero"),
    ("{{ raise_exception | tojson }}", {}, "TypeError: Object of type function is not JSON serializable"),
    ("{{ messages[5]['content'] }}", {}, "has no element 5"),
    ("{{ messages", {}, "unexpected end of template"),
    ("{{ messages[0].content.__class__.__mro__ }}", {}, "access to attribute '__class__'"),
    ("{{ namespace(__x=1).__x }}", {}, "a namespace cannot hold '__x'"),
    ("{% include '/etc/passwd' %}", {}, "no loader"),
  ],
)
def test_what_a_template_does_wrong_is_one_error(template, answer, why):
  """Each is an error of transformers' too, of one kind or another."""
  messages = [USER, {"role": "assistant"} | answer]
  with pytest.raises(Exception, match="."):
    theirs(template, messages)
  with pytest.raises(UserError, match=f"^the chat template rejects these messages: .*{why}"):
    ours(template).chat(messages, prompt=False)


def test_messages_that_are_no_objects():
  with pytest.raises(UserError, match="a message is an object with 'role' and 'content', not str"):
    ours(CHATML).chat(["hi"])
  nested = []
  for _ in range(100_000):
    nested = [nested]
  with pytest.raises(UserError, match="the messages are no JSON values"):
    ours(CHATML).chat([{"role": "user", "content": nested}])


@pytest.fixture
def impatient(monkeypatch):
  """A process for this test alone, which has a second."""
  process = chat_template._Process()
  monkeypatch.setattr(chat_template, "_processes", [process])
  monkeypatch.setattr(chat_template, "SECONDS", 1)
  yield process
  process.end()


@pytest.mark.parametrize(
  ("template", "why"),
  [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s of computing"),
    ("{{ 'a' * 10 ** 10 }}", "takes more than 512 MiB of memory"),
    ("{{ 'a' * 10 ** 8 }}", "writes more than 20000000 characters"),
    ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "512 MiB"),
    ("{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", "takes"),
    ("{{ ('a' * 10 ** 4).replace('', 'b' * 10 ** 7) }}", "512 MiB of memory"),
    ("{{ '%1000000000d' % 1 }}", "takes more|writes more"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ raise_exception('a' * 10 ** 7) }}", "a{500}$"),
  ],
  ids=["loop", "product", "text", "doubling", "lists", "replacement", "width", "recursion", "message"],
)  # fmt: skip
def test_time_and_size_are_bounded(impatient, template, why):
  """One line each, within seconds, and nothing of it in this process's memory; the next chat is served as ever."""
  began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(UserError, match=why) as caught:
    ours(template).chat([USER])
  assert "chat template" in str(caught.value)
  assert len(str(caught.value)) < 600
  assert time.monotonic() - began < 30
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
  assert ours(CHATML).chat([USER]) == theirs(CHATML, [USER], add_generation_prompt=True)


def test_one_process_serves_all_chats(impatient):
  tokenizer = ours(CHATML)
  tokenizer.chat([USER])
  number = impatient._running.pid
  began = time.monotonic()
  for _ in range(300):
    tokenizer.chat([USER])
  assert impatient._running.pid == number
  assert time.monotonic() - began < 10  # compiled for each, it would take a millisecond or more; a process, 60


def test_the_date_is_what_the_tokenizer_says():
  template = Template("{{ strftime_now('%d %b %Y') }}", {}, datetime.datetime(2024, 2, 29))
  assert template.render([Call([], False)])[0].text == "29 Feb 2024"
  assert template.tells_the_date
  today = ours("{{ strftime_now('%Y') }}").chat([])
  assert abs(int(today) - datetime.datetime.now().year) <= 1


@pytest.mark.parametrize("prefill", ["The answer:", "The answer: ", "  spaced  ", "", "line\n"])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_continued_as_transformers_does(prefill, trim):
  template = CHATML.replace("m['content']", f"(m['content']{trim})")
  messages = [USER, {"role": "assistant", "content": prefill}]
  expected = theirs(template, messages, continue_final_message=True)
  assert ours(template).template.continued(messages) == expected
  if not trim:
    assert expected.endswith("<|im_start|>assistant\n" + prefill)


def test_what_cannot_be_continued():
  template = ours("{% for m in messages %}{{ m.role }}{% endfor %}").template
  for messages, why in (
    ([], "no last message"),
    ([{"role": "user", "content": None}], "has no text to continue"),
    ([USER], "does not write the last message as it is"),
  ):
    with pytest.raises(UserError, match=why):
      template.continued(messages)


def test_parts_are_continued():
  template = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
  messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}]
  assert (
    ours(template).template.continued(messages) == "[a][b " == theirs(template, messages, continue_final_message=True)
  )
