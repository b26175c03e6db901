"""Text to tokens and back, and the model's chat template."""

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
"""Maximum characters that a normaliser may make of one; real ones make up to 18 of U+FDFA, and two of most."""

_USUAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Default tokens of SentencePiece and Mistral vocabularies, which settings may omit."""
_SPLIT = "split_special_tokens"
"""The setting that makes special tokens in a text plain text."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A Hugging Face fast tokenizer and its chat template.

  Attributes:
    backend: the `tokenizers` object; its vocabulary and special tokens are the model's.
    chat_template: a Jinja template over ``messages``, or None.
    templates: other templates by name, such as ``tool_use``.
    special: the special tokens that templates refer to, such as ``bos_token``.
    now: the time for templates that insert the date; None for the time of each call.
  """

  backend: tokenizers.Tokenizer
  chat_template: str | None = None
  special: Special = ()
  now: datetime.datetime | None = None
  templates: Special = ()

  def encode(self, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text; ``special`` adds the tokenizer's tokens around a text, such as a start token.

    Raises:
      UserError: if the text contains half of a surrogate pair, which cannot be encoded.
    """
    return self.backend.encode(encodable(text), add_special_tokens=special).ids

  def special_id(self, name: str) -> int | None:
    """The id of a special token by name, such as ``eos_token``, or None."""
    text = dict(self.special).get(name)
    return None if text is None else self.backend.token_to_id(text)

  @functools.cached_property
  def around(self) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after a text."""
    encoded = self.backend.encode("a")
    ordinary = [at for at, special in enumerate(encoded.special_tokens_mask) if not special]
    first, last = (ordinary[0], ordinary[-1]) if ordinary else (len(encoded.ids), len(encoded.ids))
    return encoded.ids[:first], encoded.ids[last + 1 :]

  def opening(self, choice: str = "auto") -> list[int]:
    """The tokens at the start of each row of text, as the model was trained.

    Args:
      choice: ``auto`` for the tokens that the tokenizer adds before a text, if any; ``none``; or a token.

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
        f"the vocabulary has no token {choice!r} (`start_token`); use auto, none or a token of the vocabulary"
      )
    return [token]

  def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids; ``special`` keeps special tokens."""
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
      name: its name; None for ``default``, or with tools for ``tool_use`` if there is one.
      tools: whether there are tools.

    Raises:
      UserError: if the model has no chat template, or none of that name.
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
    """Formats chat messages as the text that the model was trained on.

    The template inserts special tokens itself: encode its text with ``special=False``. Keys with null values are
    removed from the messages, as in transformers.

    Args:
      messages: each with ``role`` and ``content``.
      prompt: whether to add the generation prompt; by default, unless a message is continued.
      tools: JSON schemas of functions that the model may call.
      template: name of the template, if there are several; see `template_of`.
      continue_final_message: whether the text ends with the last message, for the model to continue; or the field to
        continue, such as ``reasoning_content``.
      options: other template variables, such as ``enable_thinking``, ``reasoning_effort`` or ``documents``.

    Raises:
      UserError: if the model has no chat template, or that rejects the messages, fails, or exceeds its time or memory.
    """
    chosen = self.template_of(template, tools=tools is not None)
    variables = chosen.variables({**options, "tools": tools})
    if unread := chosen.unread(options):
      _LOG.warning("this model's chat template does not read %s", ", ".join(unread))
    if not continue_final_message:
      return chosen.render([Call(messages, prompt is not False, variables)])[0].text
    if prompt:
      raise UserError(
        "`prompt` starts a new answer, so it cannot be combined with continuing the last message; leave one out"
      )
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    return chosen.continued(messages, field, variables)

  def save(self, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` for `read_tokenizer` and transformers."""
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
  """Returns the text if it can be encoded.

  Raises:
    UserError: if it contains half of a surrogate pair, which JSON can represent.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"the text is not Unicode: character {error.start} is half of a surrogate pair") from None
  return text


def _check_growth(backend: tokenizers.Tokenizer, file: Path) -> None:
  """Checks that no part of a tokenizer multiplies texts: such a file could exhaust memory with the first text.

  Raises:
    UserError: names the part.
  """
  for name in ("normalizer", "decoder", "post_processor"):
    part = getattr(backend, name)
    if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > _GROWTH:
      raise UserError(f"{file}: its {name} can expand one character to {growth:,}; at most {_GROWTH} are allowed")


def _growth(part: Mapping[str, Any]) -> int:
  """Maximum number of characters, or copies of a text, that a part of a tokenizer makes of one.

  Unicode operations (NFKC, lower case) are bounded, and not repeated by the next part.
  """
  inner = next((part[name] for name in ("normalizers", "decoders", "processors") if name in part), None)
  if isinstance(inner, list):
    return math.prod(map(_growth, inner))
  if part["type"] == "Replace":
    pattern, made = part["pattern"], len(part["content"])
    # The pattern may match the empty string before every character.
    return max(1, -(-made // len(pattern["String"]))) if pattern.get("String") else 1 + made
  if part["type"] == "Precompiled":
    blob = base64.b64decode(part["precompiled_charsmap"] or "")
    replacements = blob[4 + int.from_bytes(blob[:4], "little") :]
    return max((len(each.decode(errors="replace")) for each in replacements.split(b"\0")), default=1)
  return sum("Sequence" in piece for piece in part["single"]) if part["type"] == "TemplateProcessing" else 1


def _chat_templates(value: object, path: Path) -> dict[str, str]:
  """Chat templates by name, a single one as ``default``: from separate files, or else from the settings.

  Raises:
    UserError: if they are malformed.
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
      raise UserError(f"{path}: chat_template is {shown(value)}; must be objects with 'name' and 'template'")
    value = {entry["name"]: entry.get("template") for entry in value}
  listed = value if isinstance(value, dict) else {} if value is None else {"default": value}
  named: dict[str, str] = {}
  for name, text in listed.items():
    if not isinstance(text, str):
      raise UserError(f"{path}: chat_template is {shown(text)}; must be a string")
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
  """The tokenizer of a folder without ``tokenizer.json``, and the settings with defaults for such files.

  Raises:
    UserError: if there is no vocabulary, it is damaged, or it lacks tokens that the settings add around texts.
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
    raise UserError(f"{file} has no {' and no '.join(map(repr, lacking))}, which its settings add to texts")
  put_around(backend, before, after)
  return backend, values


def warn_of_tokenizer(path: Path) -> None:
  """Warns if a folder's tokenizer, which is about to be copied unchanged, cannot be read."""
  if any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tekken.json")):
    try:
      read_tokenizer(path)
    except UserError as error:
      _LOG.warning("%s; the tokenizer is copied as it is", error)


def read_tokenizer(path: Path) -> Tokenizer:
  """The tokenizer in a folder, with its settings.

  Reads the first one of ``tokenizer.json``, ``tokenizer.model`` (SentencePiece or tiktoken) and ``tekken.json``.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  values = read_settings(path)
  file = path / "tokenizer.json"
  if file.exists():
    backend = _from_json(file)
  else:
    backend, values = _from_vocabulary(path, values)
  # Padding and truncation of the last call are saved in the file, but are not part of the model.
  backend.no_truncation()
  backend.no_padding()
  backend.encode_special_tokens = values.get(_SPLIT) is True
  special = add_tokens(backend, values, path)
  templates = _chat_templates(values.get("chat_template"), path)
  default = templates.pop("default", None)
  return Tokenizer(backend, default, special, templates=tuple(templates.items()))
