"""Chat templates: as transformers renders them, in bounded time and memory, whatever the messages hold."""

import datetime
import functools
import json
import logging
import os
import resource
import signal
import time

import pytest

from sa_jax import Tokenizer, UserError, load_tokenizer
from sa_jax.formats import chat_template
from sa_jax.formats.chat_template import Call, Template
from sa_jax.formats.extras import copy_extras
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
  with pytest.raises(UserError, match="a message must be an object with 'role' and 'content', not str"):
    ours(CHATML).chat(["hi"])
  nested = []
  for _ in range(100_000):
    nested = [nested]
  with pytest.raises(UserError, match="the messages are not JSON values"):
    ours(CHATML).chat([{"role": "user", "content": nested}])


@pytest.fixture
def impatient(monkeypatch):
  """A process for this test alone, which has a second."""
  process = chat_template._Process()
  monkeypatch.setattr(chat_template, "_processes", [process])
  monkeypatch.setattr(chat_template, "SECONDS", 2)
  yield process
  process.end()


@pytest.mark.parametrize(
  ("template", "why"),
  [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s of CPU time"),
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


def test_signals_to_a_whole_group_leave_the_process_and_one_that_was_killed_is_started_again(impatient):
  tokenizer = ours(CHATML)
  said = tokenizer.chat([USER])
  number = impatient._running.pid
  for each in (signal.SIGINT, signal.SIGTERM):
    os.kill(number, each)
  assert tokenizer.chat([USER]) == said
  assert impatient._running.pid == number
  os.kill(number, signal.SIGKILL)
  impatient._running.wait()
  assert tokenizer.chat([USER]) == said
  assert impatient._running.pid != number


def test_the_date_is_what_the_tokenizer_says():
  template = Template("{{ strftime_now('%d %b %Y') }}", {}, datetime.datetime(2024, 2, 29))
  assert template.render([Call([], False)])[0].text == "29 Feb 2024"
  assert template.uses_date
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


TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]
OPEN = """
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for each in documents or [] %}[{{ each.title }}]{% endfor %}
{%- for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}
{{- bos_token }}{{ reasoning_effort }}"""


@pytest.mark.parametrize(
  "options",
  [
    {"tools": TOOLS},
    {"tools": []},
    {"documents": [{"title": "a", "text": "b"}], "tools": TOOLS},
    {"enable_thinking": False},
    {"reasoning_effort": "low", "bos_token": "<other>"},
  ],
  ids=lambda options: "+".join(options),
)
def test_tools_and_options_as_transformers_gives_them(options):
  messages = [USER, {"role": "assistant", "content": "yo", "thinking": "hm"}]
  expected = theirs(OPEN, messages, add_generation_prompt=True, **options)
  assert expected != theirs(OPEN, messages, add_generation_prompt=True) or options == {"tools": []}
  assert ours(OPEN).chat(messages, **options) == expected


@pytest.mark.parametrize("field", [True, "reasoning_content", "reasoning"])
def test_any_field_is_continued_as_transformers_does(field):
  messages = [USER, {"role": "assistant", "content": "yo ", "reasoning": "hm "}]
  expected = theirs(OPEN, messages, continue_final_message=field)
  assert expected.endswith("|yo " if field is True else ">hm ")
  assert ours(OPEN).chat(messages, continue_final_message=field) == expected


@pytest.mark.parametrize(
  ("options", "why"),
  [
    ({"tools": [print]}, "tools must be a list of objects .*, not .*print"),
    ({"documents": ["x"]}, "documents must be a list of objects"),
    ({"add_generation_prompt": True}, "use `prompt`"),
    ({"continue_final_message": True, "prompt": True}, "leave one out"),
    ({"continue_final_message": "role_content"}, "no text to continue"),
    ({"template": "defualt"}, "there is no chat template 'defualt'; there are default; did you mean default"),
  ],
)
def test_what_a_chat_cannot_have(options, why):
  with pytest.raises(UserError, match=why):
    ours(OPEN).chat([USER], **options)


def test_an_option_that_the_template_does_not_read_is_told(caplog):
  with caplog.at_level(logging.WARNING, "sa_jax"):
    ours(OPEN).chat([USER], enable_thinking=False, enable_thinkin=False)
  assert [record.getMessage() for record in caplog.records] == [
    "this model's chat template does not read enable_thinkin"
  ]


NAMED = [
  {"name": "default", "template": "D{{ messages | length }}"},
  {"name": "tool_use", "template": "T{{ tools | length }}"},
  {"name": "rag", "template": "R{{ documents | length }}"},
]
RAG = "additional_chat_templates/rag.jinja"


def folder_of(path, listed, files):
  byte_tokenizer().save(path)
  values = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": listed} if listed else {})
  (path / "tokenizer_config.json").write_text(json.dumps(values))
  for name, text in files.items():
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(text)


@pytest.mark.parametrize(
  ("listed", "files", "plain", "with_tools", "rag"),
  [
    (NAMED, {}, "D1", "T1", "R0"),
    (NAMED[1:], {}, None, "T1", "R0"),
    (NAMED, {RAG: "F"}, None, None, "F"),
    (NAMED, {RAG: "F", "chat_template.jinja": "C"}, "C", "C", "F"),
    (NAMED, {"chat_template.jinja": "C"}, "C", "C", None),
    ("one", {}, "one", "one", None),
    (None, {RAG: "F"}, None, None, "F"),
  ],
)
def test_named_templates_as_transformers_reads_them(tmp_path, listed, files, plain, with_tools, rag):
  """Those of files come before those of the settings, all of them."""
  folder_of(tmp_path, listed, files)
  ours, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
  for options, expected in (({}, plain), ({"tools": TOOLS}, with_tools), ({"template": "rag", "documents": []}, rag)):
    named = {"chat_template" if name == "template" else name: value for name, value in options.items()}
    if expected is None:
      with pytest.raises(UserError, match="there is no chat template '(default|rag)'; there (are|is) "):
        ours.chat([USER], **options)
    else:
      assert ours.chat([USER], **options) == expected == theirs.apply_chat_template([USER], tokenize=False, **named)


def test_named_templates_are_saved_and_travel(tmp_path):
  (tmp_path / "from").mkdir()
  folder_of(tmp_path / "from", None, {RAG: "F", "chat_template.jinja": "C"})
  read = load_tokenizer(tmp_path / "from")
  assert (read.chat_template, read.templates) == ("C", (("rag", "F"),))
  for name, write in (("saved", read.save), ("copied", functools.partial(copy_extras, tmp_path / "from"))):
    (tmp_path / name).mkdir()
    write(tmp_path / name)
    found = load_tokenizer(tmp_path / name)
    assert (found.chat_template, found.templates) == ("C", (("rag", "F"),))


def test_what_cannot_be_continued():
  template = ours("{% for m in messages %}{{ m.role }}{% endfor %}").template
  for messages, why in (
    ([], "no last message"),
    ([{"role": "user", "content": None}], "has no text to continue"),
    ([USER], "changes the last message"),
  ):
    with pytest.raises(UserError, match=why):
      template.continued(messages)


def test_parts_are_continued():
  template = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
  messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}]
  assert (
    ours(template).template.continued(messages) == "[a][b " == theirs(template, messages, continue_final_message=True)
  )
