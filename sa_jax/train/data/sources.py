"""Files to documents: text, JSON lines, Alpaca, prompts with completions, chats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sa_jax.errors import UserError
from sa_jax.formats import Tokenizer

Documents = Literal["file", "blank_lines", "endoftext"]

END_OF_TEXT = "<|endoftext|>"
_ALPACA = (
  "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
)


class Piece(NamedTuple):
  """Attributes:
  text: a part of a document.
  trained: whether the model learns to write it, or only reads it.
  """

  text: str
  trained: bool


class Document(NamedTuple):
  """Attributes:
  pieces: the text.
  complete: whether it begins and ends as the model expects; otherwise the tokenizer's start and end are to be added.
  """

  pieces: tuple[Piece, ...]
  complete: bool = False


@dataclasses.dataclass
class Report:
  """What was read.

  Attributes:
    documents: how many.
    bad: lines left out because they could not be used (``skip_bad``).
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

  ``.jsonl`` holds one JSON object a line, ``.json`` a list of objects; every other file is text. Objects are understood
  by their keys: ``messages`` (a chat; the assistant's turns are learnt), ``instruction`` with ``output`` and perhaps
  ``input`` (Alpaca), ``prompt`` with ``completion``, or the text key.

  Args:
    paths: the files.
    tokenizer: its chat template makes text of chats, and of Alpaca where it has one (Alpaca's own prompt otherwise).
    report: is counted up.
    documents: of a text file: the whole ``file``, or what is between ``blank_lines`` or ``endoftext`` marks.
    text_key: of an object that is only text.
    skip_bad: leaves out lines that cannot be used, and counts them.

  Raises:
    UserError: if a file cannot be read or has no document; at a line that cannot be used, with its number.
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
  if path.suffix not in (".json", ".jsonl"):
    for text in _texts(path, documents):
      if text.strip():
        yield Document((Piece(text, True),))
    return
  for place, entry in _objects(path):
    try:
      yield _document(json.loads(entry) if isinstance(entry, bytes) else entry, tokenizer, text_key)
    except (ValueError, RecursionError) as error:
      reason = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
      if not skip_bad:
        raise UserError(f"{path}, {place}: {reason}; --skip-bad leaves such lines out") from None
      report.bad += 1


def _lines(path: Path) -> Iterator[bytes]:
  try:
    with path.open("rb") as file:
      yield from file
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from None


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
  """Each object of a file: undecoded lines of ``.jsonl``, values of ``.json``; with its place for messages."""
  if path.suffix == ".jsonl":
    for number, line in enumerate(_lines(path), 1):
      if line.strip():
        yield f"line {number}", line
    return
  try:
    values = json.loads(b"".join(_lines(path)) or b"[]")
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{path} is not JSON: {error}") from None
  if not isinstance(values, list):
    raise UserError(f"{path} holds a JSON {type(values).__name__}; a list of objects is needed")
  for index, value in enumerate(values):
    yield f"entry {index}", value


def _texts(path: Path, documents: Documents) -> Iterator[str]:
  """The documents of a text file, read line by line; some may be blank."""
  held: list[str] = []
  try:
    for line in _lines(path):
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


def _document(values: Any, tokenizer: Tokenizer, text_key: str) -> Document:
  if not isinstance(values, dict):
    raise UserError(f"a JSON object is needed, not {type(values).__name__}")
  if "messages" in values:
    return chat_document(values["messages"], tokenizer)
  if {"instruction", "output"} <= set(values):
    return alpaca_document(_text(values, "instruction"), _text(values, "input", ""), _text(values, "output"), tokenizer)
  if {"prompt", "completion"} <= set(values):
    return Document((Piece(_text(values, "prompt"), False), Piece(_text(values, "completion"), True)))
  if text_key in values:
    return Document((Piece(_text(values, text_key), True),))
  raise UserError(
    f"it has the keys {sorted(values)}; 'messages', 'instruction' and 'output', 'prompt' and 'completion', "
    f"or {text_key!r} (--text-key) are needed"
  )


def _text(values: dict[str, Any], key: str, default: str | None = None) -> str:
  text = values.get(key, default)
  if not isinstance(text, str) or not (text or default is not None):
    raise UserError(f"{key!r} is {'empty' if text == '' else type(text).__name__}; a text is needed")
  return text


def alpaca_document(instruction: str, given: str, output: str, tokenizer: Tokenizer) -> Document:
  """A row of Alpaca: a chat where the tokenizer has a template for it, otherwise Alpaca's own prompt."""
  if tokenizer.chat_template is not None:
    user = f"{instruction}\n\n{given}" if given else instruction
    return chat_document([{"role": "user", "content": user}, {"role": "assistant", "content": output}], tokenizer)
  prompt = _ALPACA.format(more=", paired with an input that provides further context" if given else "")
  prompt += f"\n\n### Instruction:\n{instruction}\n\n"
  prompt += f"### Input:\n{given}\n\n### Response:\n" if given else "### Response:\n"
  return Document((Piece(prompt, False), Piece(output, True)))


def chat_document(messages: Any, tokenizer: Tokenizer) -> Document:
  """A chat through the tokenizer's own template; each of the assistant's turns is learnt, with what ends it.

  The pieces join to exactly what the template makes of the whole chat.

  Raises:
    UserError: if the messages have another form, none is the assistant's, or the template does not write a chat so
      that each turn follows what is written before it.
  """
  if not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
    raise UserError("'messages' is not a list of objects with 'role' and 'content'")
  answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
  if not answers:
    raise UserError("no message is the assistant's, so there is nothing to learn")
  whole = tokenizer.chat(messages, prompt=False)
  pieces: list[Piece] = []
  done = 0
  for index in answers:
    before = tokenizer.chat(messages[:index]) if index else ""
    after = tokenizer.chat(messages[: index + 1], prompt=False)
    if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
      raise UserError(f"the chat template writes message {index} otherwise at the end of a chat than inside it")
    pieces += [Piece(whole[done : len(before)], False), Piece(whole[len(before) : len(after)], True)]
    done = len(after)
  pieces.append(Piece(whole[done:], False))
  return Document(tuple(piece for piece in pieces if piece.text), complete=True)
