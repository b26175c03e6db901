"""Text to tokens and back, with the model's own chat template."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sa_jax.errors import UserError
from sa_jax.files import read_text
from sa_jax.formats.chat_template import Call, Message, Template
from sa_jax.formats.extras import check_small, read_json

_GROWTH = 1000
"""Characters that a normaliser may make of one; those of people's models make 18 of U+FDFA and two of most."""
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""The special tokens that templates may name."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A Hugging Face fast tokenizer and the chat template that belongs to it.

  Attributes:
    backend: the `tokenizers` object; its vocabulary and special tokens are the model's.
    chat_template: a Jinja template over ``messages``, or None.
    special: the special tokens that templates refer to, such as ``bos_token``.
    now: the moment that a template which writes the date is told; None for the moment of each call.
  """

  backend: tokenizers.Tokenizer
  chat_template: str | None = None
  special: tuple[tuple[str, str], ...] = ()
  now: datetime.datetime | None = None

  def encode(self, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text; ``special`` adds what the tokenizer puts around a text, such as a start token.

    Raises:
      UserError: if the text is not Unicode: half of a surrogate pair has no encoding.
    """
    return self.backend.encode(encodable(text), add_special_tokens=special).ids

  def special_id(self, name: str) -> int | None:
    """The token that ``special`` has under a name, such as ``eos_token``, or None."""
    text = dict(self.special).get(name)
    return None if text is None else self.backend.token_to_id(text)

  @functools.cached_property
  def around(self) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before a text, and those that it puts after it."""
    encoded = self.backend.encode("a")
    ordinary = [at for at, special in enumerate(encoded.special_tokens_mask) if not special]
    first, last = (ordinary[0], ordinary[-1]) if ordinary else (len(encoded.ids), len(encoded.ids))
    return encoded.ids[:first], encoded.ids[last + 1 :]

  def opening(self, choice: str = "auto") -> list[int]:
    """The tokens that a row of text begins with, as the model has learnt to read it.

    Args:
      choice: ``auto`` for what the tokenizer itself puts before a text, which may be nothing; ``none``; or a token.

    Raises:
      UserError: if the token is not in the vocabulary.
    """
    if choice == "auto":
      return self.around[0]
    if choice == "none":
      return []
    token = self.backend.token_to_id(choice)
    if token is None:
      raise UserError(
        f"the vocabulary has no token {choice!r} to begin rows with (`start_token`); auto and none need none"
      )
    return [token]

  def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids; ``special`` keeps special tokens visible."""
    return self.backend.decode([int(token) for token in tokens], skip_special_tokens=not special)

  @property
  def template(self) -> Template:
    """The chat template, ready to render.

    Raises:
      UserError: if the model has none.
    """
    if self.chat_template is None:
      raise UserError("this model has no chat template: it takes plain text, not messages")
    return Template(self.chat_template, dict(self.special), self.now)

  def chat(self, messages: Sequence[Message], *, prompt: bool = True) -> str:
    """Chat messages as the text that the model was trained on.

    The template writes special tokens itself: encode its text with ``special=False``. Values that are null are left
    out of the messages, as transformers does.

    Args:
      messages: each with ``role`` and ``content``.
      prompt: whether to end with the opening of the assistant's answer.

    Raises:
      UserError: if the model has no chat template, or it rejects the messages, fails, or takes too much time or memory.
    """
    return self.template.render([Call(messages, prompt)])[0].text

  def save(self, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which `read_tokenizer` and transformers read."""
    (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(self.special)
    if self.chat_template is not None:
      values["chat_template"] = self.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def encodable(text: str) -> str:
  """The text, if it can be encoded.

  Raises:
    UserError: if it holds half of a surrogate pair, as JSON can spell it.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"the text is not Unicode: character {error.start} is half of a surrogate pair") from None
  return text


def _add_tokens(backend: tokenizers.Tokenizer, listed: object, path: Path) -> None:
  """Adds the tokens that ``tokenizer_config.json`` lists and ``tokenizer.json`` lacks, as transformers does.

  Raises:
    UserError: if the list has another form, or a token gets another number than it is listed with.
  """
  options = ("single_word", "lstrip", "rstrip", "normalized", "special")
  entries: list[tuple[int, str, dict[str, bool]]] = []
  faults = []
  for number, entry in listed.items() if isinstance(listed, dict) else ():
    content = entry.get("content") if isinstance(entry, dict) else entry
    chosen = {name: entry[name] for name in options if name in entry} if isinstance(entry, dict) else {}
    if not (isinstance(content, str) and number.isdecimal() and all(isinstance(is_, bool) for is_ in chosen.values())):
      faults.append(f"{number!r} is {_shown(entry)}; a number and an object with a text 'content' are needed")
    else:
      entries.append((int(number), content, chosen))
  if not isinstance(listed, dict):
    faults.append(f"it is {_shown(listed)}; an object is needed")
  for number, content, chosen in sorted(entries, key=lambda entry: entry[0]):
    if backend.token_to_id(content) is None:
      backend.add_tokens([tokenizers.AddedToken(content, **chosen)])
    if backend.token_to_id(content) != number:
      faults.append(
        f"it gives {content!r} the number {number}, and tokenizer.json makes it {backend.token_to_id(content)}"
      )
  if faults:
    raise UserError.of(f"{path}: added_tokens_decoder of tokenizer_config.json", faults)


def _check_growth(backend: tokenizers.Tokenizer, file: Path) -> None:
  """Checks that nothing in a tokenizer multiplies texts: one such file would take all memory at the first text.

  Raises:
    UserError: names the part that does.
  """
  for name in ("normalizer", "decoder", "post_processor"):
    part = getattr(backend, name)
    if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > _GROWTH:
      raise UserError(f"{file}: its {name} makes up to {growth:,} characters of one; at most {_GROWTH} are taken")


def _growth(part: Mapping[str, Any]) -> int:
  """How many characters, or copies of a text, a part of a tokenizer may make of one.

  What Unicode does (NFKC, lower case) is bounded, and not done again by the next part.
  """
  inner = next((part[name] for name in ("normalizers", "decoders", "processors") if name in part), None)
  if isinstance(inner, list):
    return math.prod(map(_growth, inner))
  if part["type"] == "Replace":
    pattern, made = part["pattern"], len(part["content"])
    # An expression may match what is empty, before every character.
    return max(1, -(-made // len(pattern["String"]))) if pattern.get("String") else 1 + made
  if part["type"] == "Precompiled":
    blob = base64.b64decode(part["precompiled_charsmap"] or "")
    replacements = blob[4 + int.from_bytes(blob[:4], "little") :]
    return max((len(each.decode(errors="replace")) for each in replacements.split(b"\0")), default=1)
  return sum("Sequence" in piece for piece in part["single"]) if part["type"] == "TemplateProcessing" else 1


def _shown(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _special(values: Mapping[str, object], path: Path) -> tuple[tuple[str, str], ...]:
  """The special tokens that a tokenizer's settings name.

  Raises:
    UserError: if one is no text.
  """
  out, faults = [], []
  for name in _ROLES:
    value = values.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if isinstance(text, str):
      out.append((name, text))
    elif value is not None:
      faults.append(f"{name} is {_shown(value)}; a text or an object with a text 'content' is needed")
  if faults:
    raise UserError.of(f"{path}: the tokenizer's settings", faults)
  return tuple(out)


def _chat_template(value: object, path: Path) -> str | None:
  """The template among several with names, or the only one.

  Raises:
    UserError: if it has another form.
  """
  if isinstance(value, list):
    if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value):
      raise UserError(f"{path}: chat_template is {_shown(value)}; objects with 'name' and 'template' are needed")
    value = {entry["name"]: entry.get("template") for entry in value}
  if isinstance(value, dict):
    value = value.get("default")
  if value is not None and not isinstance(value, str):
    raise UserError(f"{path}: chat_template is {_shown(value)}; a text is needed")
  return value


def _from_json(file: Path) -> tokenizers.Tokenizer:
  check_small(file)
  text = read_text(file)
  try:
    backend = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the tokenizers package raises bare Exception
    raise UserError(f"{file} is not a tokenizer: {error}") from None
  _check_growth(backend, file)
  return backend


def _from_pieces(file: Path, values: Mapping[str, object]) -> tokenizers.Tokenizer:
  """From SentencePiece's own file, with what Llama's settings put around a text."""
  from sa_jax.formats.sentencepiece_model import backend_of, put_around, read_pieces

  check_small(file)
  backend = backend_of(read_pieces(file))
  around = dict(_special(values, file.parent))
  before = [around["bos_token"]] if values.get("add_bos_token", True) and "bos_token" in around else []
  after = [around["eos_token"]] if values.get("add_eos_token", False) and "eos_token" in around else []
  if lacking := [token for token in before + after if backend.token_to_id(token) is None]:
    raise UserError(f"{file} has no {' and no '.join(map(repr, lacking))}, which the settings put around texts")
  put_around(backend, before, after)
  return backend


def read_tokenizer(path: Path) -> Tokenizer:
  """The tokenizer in a folder, from ``tokenizer.json`` or ``tokenizer.model``, and the settings beside it.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  values: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (path / name).exists():
      values |= {key: value for key, value in read_json(path / name).items() if value is not None}
  file = path / "tokenizer.json"
  if file.exists():
    backend = _from_json(file)
  elif (pieces := path / "tokenizer.model").exists():
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | values
    backend = _from_pieces(pieces, values)
  else:
    raise UserError(f"there is no tokenizer.json in {path}, and no tokenizer.model")
  # Whatever a tokenizer was last called with is saved with it, and is no property of the model.
  backend.no_truncation()
  backend.no_padding()
  _add_tokens(backend, values.get("added_tokens_decoder", {}), path)
  template = _chat_template(values.get("chat_template"), path)
  if (separate := path / "chat_template.jinja").exists():
    check_small(separate)
    template = read_text(separate)
  special = _special(values, path)
  # As transformers does: what has a role is found whole in a text, and is no text to read.
  known = {token.content for token in backend.get_added_tokens_decoder().values()}
  named = [token for _, token in special if token not in known and backend.token_to_id(token) is not None]
  backend.add_special_tokens(list(dict.fromkeys(named)))
  return Tokenizer(backend, template, special)
