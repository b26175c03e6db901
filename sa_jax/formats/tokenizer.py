"""Text to tokens and back, with the model's own chat template."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sa_jax.errors import UserError, near, shown
from sa_jax.files import read_text
from sa_jax.formats.byte_level import is_tiktoken, read_tekken, read_tiktoken
from sa_jax.formats.chat_template import Call, Message, Template
from sa_jax.formats.extras import NAMED_TEMPLATES, check_small
from sa_jax.formats.sentencepiece_model import backend_of, put_around, read_pieces
from sa_jax.formats.special_tokens import Special, add_tokens, by_number, read_settings, special_of

_LOG = logging.getLogger("sa_jax")
_GROWTH = 1000
"""Characters that a normaliser may make of one; those of people's models make 18 of U+FDFA and two of most."""

_USUAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""The tokens of SentencePiece's and Mistral's vocabularies, of which settings need not tell."""
_SPLIT = "split_special_tokens"
"""The setting by which special tokens in a text are text, and not themselves."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A Hugging Face fast tokenizer and the chat template that belongs to it.

  Attributes:
    backend: the `tokenizers` object; its vocabulary and special tokens are the model's.
    chat_template: a Jinja template over ``messages``, or None.
    templates: other templates by name, such as ``tool_use``.
    special: the special tokens that templates refer to, such as ``bos_token``.
    now: the moment that a template which writes the date is told; None for the moment of each call.
  """

  backend: tokenizers.Tokenizer
  chat_template: str | None = None
  special: Special = ()
  now: datetime.datetime | None = None
  templates: Special = ()

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
    return self.template_of()

  def template_of(self, name: str | None = None, *, tools: bool = False) -> Template:
    """One of several chat templates, ready to render.

    Args:
      name: which; ``default``, or ``tool_use`` for tools if there is one, when None.
      tools: whether there are tools.

    Raises:
      UserError: if the model has none, or none of the name.
    """
    known = dict(self.templates) | ({} if self.chat_template is None else {"default": self.chat_template})
    if not known:
      raise UserError("this model has no chat template: it takes plain text, not messages")
    asked = name or ("tool_use" if tools and "tool_use" in known else "default")
    if asked not in known:
      raise UserError(f"there is no chat template {asked!r}; there are {', '.join(sorted(known))}{near(asked, known)}")
    return Template(known[asked], dict(self.special), self.now)

  def chat(
    self,
    messages: Sequence[Message],
    *,
    prompt: bool | None = None,
    tools: Sequence[Mapping[str, object]] | None = None,
    template: str | None = None,
    continue_final_message: bool | str = False,
    **options: object,
  ) -> str:
    """Chat messages as the text that the model was trained on.

    The template writes special tokens itself: encode its text with ``special=False``. Values that are null are left
    out of the messages, as transformers does.

    Args:
      messages: each with ``role`` and ``content``.
      prompt: whether to end with the opening of the assistant's answer, as it does unless a message is continued.
      tools: JSON schemas of functions that the model may call.
      template: which of several by name; see `template_of`.
      continue_final_message: whether the text ends where the last message's does, for the model to go on with; or the
        field of it that is gone on with, such as ``reasoning_content``.
      options: what else the template reads, such as ``enable_thinking``, ``reasoning_effort`` or ``documents``.

    Raises:
      UserError: if the model has no chat template, or it rejects the messages, fails, or takes too much time or memory.
    """
    chosen = self.template_of(template, tools=tools is not None)
    variables = chosen.variables({**options, "tools": tools})
    if unread := chosen.unread(options):
      _LOG.warning("this model's chat template does not read %s", ", ".join(unread))
    if not continue_final_message:
      return chosen.render([Call(messages, prompt is not False, variables)])[0].text
    if prompt:
      raise UserError("a last message that is continued has no `prompt` of another answer after it; leave one out")
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    return chosen.continued(messages, field, variables)

  def save(self, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which `read_tokenizer` and transformers read."""
    (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(self.special)
    if self.backend.encode_special_tokens:
      values[_SPLIT] = True
    if self.chat_template is not None:
      values["chat_template"] = self.chat_template
    if self.templates:
      named = {**dict(self.templates), **({"default": self.chat_template} if self.chat_template is not None else {})}
      values["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
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


def _chat_templates(value: object, path: Path) -> dict[str, str]:
  """Chat templates by name, an only one's being ``default``: of files of their own, or else of the settings.

  Raises:
    UserError: if they have another form.
  """
  files = {file.stem: file for file in sorted((path / NAMED_TEMPLATES).glob("*.jinja"))}
  if (file := path / "chat_template.jinja").exists():
    files["default"] = file
  if files:
    for file in files.values():
      check_small(file)
    return {name: read_text(file) for name, file in files.items()}
  if isinstance(value, list):
    if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value):
      raise UserError(f"{path}: chat_template is {shown(value)}; objects with 'name' and 'template' are needed")
    value = {entry["name"]: entry.get("template") for entry in value}
  listed = value if isinstance(value, dict) else {} if value is None else {"default": value}
  named: dict[str, str] = {}
  for name, text in listed.items():
    if not isinstance(text, str):
      raise UserError(f"{path}: chat_template is {shown(text)}; a text is needed")
    named[name] = text
  return named


def _from_json(file: Path) -> tokenizers.Tokenizer:
  check_small(file)
  text = read_text(file)
  try:
    backend = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the tokenizers package raises bare Exception
    raise UserError(f"{file} is not a tokenizer: {error}") from None
  _check_growth(backend, file)
  return backend


def _from_vocabulary(path: Path, values: Mapping[str, object]) -> tuple[tokenizers.Tokenizer, dict[str, object]]:
  """From the file of a folder without ``tokenizer.json``, and the settings with what such a file goes without saying.

  Raises:
    UserError: if there is none, it is damaged, or it lacks what the settings put around texts.
  """
  file = next((path / name for name in ("tokenizer.model", "tekken.json") if (path / name).exists()), None)
  if file is None:
    raise UserError(f"there is no tokenizer.json in {path}, no tokenizer.model and no tekken.json")
  check_small(file)
  if file.name == "tekken.json":
    backend, usual = read_tekken(file), {**_USUAL, "pad_token": "<pad>"}
  elif is_tiktoken(file):
    backend, usual = read_tiktoken(file, by_number(values, path)), {}
  else:
    backend, usual = backend_of(read_pieces(file)), _USUAL
  has = lambda token: backend.token_to_id(token) is not None
  known = {role: token for role, token in usual.items() if role == "bos_token" or has(token)}
  values = {**known, "add_bos_token": bool(usual), **values}
  around = dict(special_of(values, path))
  before = [around["bos_token"]] if values["add_bos_token"] and "bos_token" in around else []
  after = [around["eos_token"]] if values.get("add_eos_token") and "eos_token" in around else []
  if lacking := [token for token in before + after if not has(token)]:
    raise UserError(f"{file} has no {' and no '.join(map(repr, lacking))}, which the settings put around texts")
  put_around(backend, before, after)
  return backend, values


def warn_of_tokenizer(path: Path) -> None:
  """Warns of a folder's tokenizer, which is about to be copied as it is, if it cannot be read."""
  if any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tekken.json")):
    try:
      read_tokenizer(path)
    except UserError as error:
      _LOG.warning("%s; the tokenizer is copied as it is", error)


def read_tokenizer(path: Path) -> Tokenizer:
  """The tokenizer in a folder, and the settings beside it.

  Of ``tokenizer.json``, ``tokenizer.model`` (SentencePiece's or tiktoken's) and ``tekken.json`` the first that is there
  is read.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  values = read_settings(path)
  file = path / "tokenizer.json"
  if file.exists():
    backend = _from_json(file)
  else:
    backend, values = _from_vocabulary(path, values)
  # Whatever a tokenizer was last called with is saved with it, and is no property of the model.
  backend.no_truncation()
  backend.no_padding()
  backend.encode_special_tokens = values.get(_SPLIT) is True
  special = add_tokens(backend, values, path)
  templates = _chat_templates(values.get("chat_template"), path)
  default = templates.pop("default", None)
  return Tokenizer(backend, default, special, templates=tuple(templates.items()))
