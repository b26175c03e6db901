"""Text to tokens and back, with the model's own chat template."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A Hugging Face fast tokenizer and the chat template that belongs to it.

  Attributes:
    backend: the `tokenizers` object; its vocabulary and special tokens are the model's.
    chat_template: a Jinja template over ``messages``, or None.
    special: the special tokens that templates refer to, such as ``bos_token``.
  """

  backend: tokenizers.Tokenizer
  chat_template: str | None = None
  special: tuple[tuple[str, str], ...] = ()

  def encode(self, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text; ``special`` adds what the tokenizer puts around a text, such as a start token."""
    return self.backend.encode(text, add_special_tokens=special).ids

  def special_id(self, name: str) -> int | None:
    """The token that ``special`` has under a name, such as ``eos_token``, or None."""
    text = dict(self.special).get(name)
    return None if text is None else self.backend.token_to_id(text)

  def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids; ``special`` keeps special tokens visible."""
    return self.backend.decode([int(token) for token in tokens], skip_special_tokens=not special)

  def chat(self, messages: Sequence[dict[str, str]], *, prompt: bool = True) -> str:
    """Chat messages as the text that the model was trained on.

    The template writes special tokens itself: encode its text with ``special=False``.

    Args:
      messages: each with ``role`` and ``content``.
      prompt: whether to end with the opening of the assistant's answer.

    Raises:
      UserError: if the model has no chat template, or it rejects the messages.
    """
    from jinja2 import TemplateError

    from sa_jax.formats.chat_template import environment

    if self.chat_template is None:
      raise UserError("this model has no chat template: it takes plain text, not messages")
    given: dict[str, Any] = {"messages": list(messages), "tools": None, "documents": None}
    try:
      template = environment().from_string(self.chat_template)
      return template.render(**given, add_generation_prompt=prompt, **dict(self.special))
    except TemplateError as error:
      raise UserError(f"the chat template rejects these messages: {error}") from None

  def save(self, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which `load_tokenizer` and transformers read."""
    self.backend.save(str(folder / "tokenizer.json"))
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(self.special)
    if self.chat_template is not None:
      values["chat_template"] = self.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def _add_tokens(backend: tokenizers.Tokenizer, listed: dict[str, dict[str, Any]], path: Path) -> None:
  """Adds the tokens that ``tokenizer_config.json`` lists and ``tokenizer.json`` lacks, as transformers does.

  Raises:
    UserError: if one gets another number than it is listed with.
  """
  options = ("single_word", "lstrip", "rstrip", "normalized", "special")
  for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
    content = entry["content"]
    if backend.token_to_id(content) is None:
      backend.add_tokens([tokenizers.AddedToken(content, **{name: entry[name] for name in options if name in entry})])
    if backend.token_to_id(content) != int(number):
      raise UserError(
        f"{path}: tokenizer_config.json gives {content!r} the number {number}, and tokenizer.json makes it "
        f"{backend.token_to_id(content)}"
      )


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of a Hugging Face folder, an sa_jax checkpoint or a GGUF file.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  from sa_jax.formats.gguf_file import GgufFile
  from sa_jax.formats.gguf_tokenizer import from_gguf
  from sa_jax.formats.source import read_json

  path = Path(path)
  if path.is_file():
    return from_gguf(GgufFile(path))
  file = path / "tokenizer.json"
  if not file.exists():
    raise UserError(f"there is no tokenizer.json in {path}")
  try:
    backend = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the tokenizers package raises bare Exception
    raise UserError(f"{file} is not a tokenizer: {error}") from None
  # Whatever a tokenizer was last called with is saved with it, and is no property of the model.
  backend.no_truncation()
  backend.no_padding()
  values: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (path / name).exists():
      values |= {key: value for key, value in read_json(path / name).items() if value is not None}
  _add_tokens(backend, values.get("added_tokens_decoder", {}), path)
  template = values.get("chat_template")
  if (separate := path / "chat_template.jinja").exists():
    template = separate.read_text(encoding="utf-8")
  if isinstance(template, list):
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  special = []
  for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
    value = values.get(name)
    if value is not None:
      special.append((name, value["content"] if isinstance(value, dict) else value))
  return Tokenizer(backend, template, tuple(special))
