"""Files to documents: text, JSON lines, Alpaca, prompts with completions, chats."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from sa_jax.errors import UserError
from sa_jax.formats import Tokenizer
from sa_jax.formats.chat_template import Call
from sa_jax.formats.tokenizer import encodable
from sa_jax.train.data import files

Documents = Literal["file", "blank_lines", "endoftext"]

_KEYS = ("messages", "tools", "chat_template_kwargs", "instruction", "input", "output", "prompt", "completion")
END_OF_TEXT = "<|endoftext|>"
_ALPACA = (
  "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
)


class Piece(NamedTuple):
  """A piece of a document.

  Attributes:
    text: part of a document.
    trained: whether the model is trained on it, or it is only context.
  """

  text: str
  trained: bool


class Document(NamedTuple):
  """A document before tokenisation.

  Attributes:
    pieces: the text.
    complete: whether it has the model's start and end tokens; if not, they are added.
  """

  pieces: tuple[Piece, ...]
  complete: bool = False


@dataclasses.dataclass
class Report:
  """Counts of what was read.

  Attributes:
    documents: number of documents.
    bad: number of skipped unusable lines (``skip_bad``).
  """

  documents: int = 0
  bad: int = 0


def read_documents(
  paths: Sequence[Path],
  tokenizer: Tokenizer,
  report: Report,
  *,
  documents: Documents = "file",
  text_key: str = "text",
  skip_bad: bool = False,
) -> Iterator[Document]:
  """The documents of files, in order.

  ``.jsonl`` holds one JSON object per line, ``.json`` a list of objects, ``.parquet`` and ``.arrow`` rows,
  ``.array_record`` one JSON object per record; any other file is text. A further suffix ``.gz`` or ``.zst`` is
  unpacked. An object's keys decide its type: ``messages`` (a chat; trained on the assistant's turns; optionally with
  ``tools`` and ``chat_template_kwargs`` for the chat template), ``instruction`` with ``output`` and optionally
  ``input`` (Alpaca), ``prompt`` with ``completion``, or the text key.

  Args:
    paths: the files.
    tokenizer: formats chats with its chat template, and also Alpaca if it has one (otherwise with Alpaca's prompt).
    report: counts are added to it.
    documents: documents of a text file: the whole ``file``, or the text between ``blank_lines`` or ``endoftext`` marks.
    text_key: key of plain text in objects.
    skip_bad: whether to skip and count unusable lines.

  Raises:
    UserError: if a file is unreadable or has no documents, or a line is unusable, with its number.
  """
  for path in paths:
    before = report.documents, report.bad
    for document in _read(path, tokenizer, report, documents, text_key, skip_bad):
      report.documents += 1
      yield document
    if report.documents == before[0]:
      why = f"all {report.bad - before[1]} of its lines are bad" if report.bad > before[1] else "it is empty"
      raise UserError(f"{path} has no document: {why}")


def _read(
  path: Path, tokenizer: Tokenizer, report: Report, documents: Documents, text_key: str, skip_bad: bool
) -> Iterator[Document]:
  if files.kind(path) not in (".json", ".jsonl", *files.TABLES):
    for text in _texts(path, documents):
      if text.strip():
        yield Document((Piece(text, True),))
    return
  for place, entry in files.objects(path, {*_KEYS, text_key}):
    try:
      found = documents_of(json.loads(entry) if isinstance(entry, bytes) else entry, tokenizer, text_key)
      yield from found
    except (ValueError, RecursionError) as error:
      reason = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
      if not skip_bad:
        raise UserError(f"{path}, {place}: {reason}; `skip_bad=True` leaves such lines out") from None
      report.bad += 1


def _texts(path: Path, documents: Documents) -> Iterator[str]:
  """The documents of a text file, read line by line; some may be blank."""
  held: list[str] = []
  try:
    for line in files.lines(path):
      text = line.decode()
      if documents == "endoftext":
        *ended, text = text.split(END_OF_TEXT)
        for end in ended:
          yield "".join([*held, end])
          held = []
      elif documents == "blank_lines" and not text.strip():
        yield "".join(held)
        held, text = [], ""
      held.append(text)
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text: {error}") from None
  yield "".join(held)


def documents_of(values: object, tokenizer: Tokenizer, text_key: str) -> list[Document]:
  """The documents of an object, according to its keys; see `read_documents`.

  Raises:
    UserError: if it is unusable.
  """
  found = _documents(values, tokenizer, text_key)
  for document in found:
    encodable("".join(piece.text for piece in document.pieces))
  return found


def _documents(values: object, tokenizer: Tokenizer, text_key: str) -> list[Document]:
  if not isinstance(values, dict):
    raise UserError(f"must be a JSON object, not {type(values).__name__}")
  if "messages" in values:
    options = _read_json(values, "chat_template_kwargs") or {}
    if not isinstance(options, dict):
      raise UserError(f"'chat_template_kwargs' is {type(options).__name__}; must be an object")
    return chat_documents(values["messages"], tokenizer, {**options, "tools": _read_json(values, "tools")})
  if {"instruction", "output"} <= set(values):
    texts = _text(values, "instruction"), _text(values, "input", ""), _text(values, "output")
    return [alpaca_document(*texts, tokenizer)]
  if {"prompt", "completion"} <= set(values):
    return [Document((Piece(_text(values, "prompt"), False), Piece(_text(values, "completion"), True)))]
  if text_key in values:
    return [Document((Piece(_text(values, text_key), True),))]
  raise UserError(
    f"it has the keys {sorted(values)}; it needs 'messages', 'instruction' and 'output', 'prompt' and 'completion', "
    f"or {text_key!r} (`text_key`)"
  )


def _read_json(values: dict[str, object], key: str) -> object:
  """A value that may be a JSON string, as in table columns of mixed type."""
  value = values.get(key)
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value)
  except ValueError as error:
    raise UserError(f"{key!r} is a string that is not JSON: {error}") from None


def _text(values: dict[str, object], key: str, default: str | None = None) -> str:
  text = values.get(key, default)
  if text is None and default is not None:  # tables store missing values as null
    text = default
  if not isinstance(text, str) or not (text or default is not None):
    raise UserError(f"{key!r} is {'empty' if text == '' else type(text).__name__}; must be a non-empty string")
  return text


def alpaca_document(instruction: str, given: str, output: str, tokenizer: Tokenizer) -> Document:
  """An Alpaca example: a chat if the tokenizer has a chat template, otherwise Alpaca's prompt."""
  if tokenizer.chat_template is not None:
    user = f"{instruction}\n\n{given}" if given else instruction
    return chat_document([{"role": "user", "content": user}, {"role": "assistant", "content": output}], tokenizer)
  prompt = _ALPACA.format(more=", paired with an input that provides further context" if given else "")
  prompt += f"\n\n### Instruction:\n{instruction}\n\n"
  prompt += f"### Input:\n{given}\n\n### Response:\n" if given else "### Response:\n"
  return Document((Piece(prompt, False), Piece(output, True)))


def chat_document(messages: object, tokenizer: Tokenizer) -> Document:
  """A chat, trained on the last answer or on all: the last of its `chat_documents`."""
  return chat_documents(messages, tokenizer)[-1]


def chat_documents(messages: object, tokenizer: Tokenizer, options: Mapping[str, object] = {}) -> list[Document]:
  """Formats a chat with the tokenizer's template; the assistant's turns, with their end tokens, are trained on.

  If a template marks the assistant's text (``{% generation %}``), the marks decide what is trained on. Otherwise each
  turn is trained on as the template formats it as the last turn, after its generation prompt, exactly as at inference.
  Usually that gives one document, the template's text for the whole chat. If the template formats a turn differently
  once others follow (Qwen3 and GLM drop the reasoning of older turns), the earlier turns and the following turn become
  separate documents, so that each turn is trained on once.

  Args:
    messages: the chat.
    tokenizer: provides the template.
    options: other variables of the template, as in `sa_jax.Tokenizer.chat`, including ``tools``.

  Raises:
    UserError: if the messages are malformed, none is the assistant's, or the template rejects them.
  """
  if not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
    raise UserError("'messages' is not a list of objects with 'role' and 'content'")
  answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
  if not answers:
    raise UserError("there is no assistant message to train on")
  template = tokenizer.template_of(tools=options.get("tools") is not None)
  variables = template.variables(options)
  calls = [Call(messages, False, variables)]
  for index in answers:
    calls += [Call(messages[:index], True, variables), Call(messages[: index + 1], False, variables)]
  # Many templates fail on a chat without messages.
  first = 1 if answers[0] == 0 else 0
  (whole, spans), *turns = template.render([call for call in calls if call.messages])
  if spans:
    return [Document(_marked(whole, spans), complete=True)]
  texts = [""] * first + [turn.text for turn in turns]
  documents: list[list[Piece]] = []
  done = ""
  for index, before, after in zip(answers, texts[::2], texts[1::2], strict=True):
    read = os.path.commonprefix([before, after])  # noqa: RUF071  # of characters
    if read != before:
      # The start of the answer may differ from the generation prompt, but the history may not.
      (history,) = template.render([Call(messages[:index], False, variables)])
      if not read.startswith(history.text):
        raise UserError(f"the chat template changes the text before message {index} when that message follows")
    if not (documents and read.startswith(done)):
      documents.append([])
      done = ""
    documents[-1] += [Piece(read[len(done) :], False), Piece(after[len(read) :], True)]
    done = after
  if whole.startswith(done):
    documents[-1].append(Piece(whole[len(done) :], False))
  return [Document(tuple(piece for piece in pieces if piece.text), complete=True) for pieces in documents]


def _marked(text: str, spans: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
  """Splits a text into pieces that are trained on (the spans) and pieces that are not."""
  pieces, done = [], 0
  for start, stop in spans:
    pieces += [Piece(text[done:start], False), Piece(text[start:stop], True)]
    done = stop
  pieces.append(Piece(text[done:], False))
  return tuple(piece for piece in pieces if piece.text)
