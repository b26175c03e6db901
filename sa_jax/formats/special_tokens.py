"""Special tokens, from all the places where a tokenizer folder defines them, following transformers.

``tokenizer_config.json`` lists them by id (``added_tokens_decoder``), by their names in chat templates (``bos_token``,
``image_token``), and without either (``extra_special_tokens``, formerly ``additional_special_tokens``). If it has no
list by id, ``special_tokens_map.json`` and ``added_tokens.json`` are read in addition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from sa_jax.errors import UserError, shown
from sa_jax.formats.extras import read_json

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LIST, _OLD_LIST, _BY_NUMBER = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"

Special = tuple[tuple[str, str], ...]
"""Names and their tokens."""


def read_settings(folder: Path) -> dict[str, object]:
  """The tokenizer settings in a folder's small files, in the form of ``tokenizer_config.json``, without nulls.

  Raises:
    UserError: if a file is not a JSON object.
  """
  values = _read(folder, "tokenizer_config.json")
  if _OLD_LIST in values:
    values.setdefault(_LIST, values.pop(_OLD_LIST))
  if _BY_NUMBER in values:
    return values
  for name, value in _read(folder, "special_tokens_map.json", with_nulls=True).items():
    before = values.get(name)
    if name == _LIST and isinstance(value, list) and isinstance(before, list):
      value = [*before, *(each for each in value if each not in before)]
    values[name] = value
  values = {name: value for name, value in values.items() if value is not None}
  if added := _read(folder, "added_tokens.json"):
    named = {_content(value) for name, value in values.items() if name in _ROLES} | set(map(_content, _listed(values)))
    flags = lambda token: {"content": token, "normalized": token not in named, "special": token in named}
    values[_BY_NUMBER] = {str(number): flags(token) for token, number in added.items()}
  if _OLD_LIST in values:
    values.setdefault(_LIST, values.pop(_OLD_LIST))
  return values


def special_of(values: Mapping[str, object], path: Path) -> Special:
  """The special tokens named in the settings.

  Raises:
    UserError: if one is not a string.
  """
  others = [name for name in values if name.endswith("_token") and name not in _ROLES]
  named = {name: values[name] for name in (*_ROLES, *others) if name in values}
  named = {name: value for name, value in named.items() if name in _ROLES or _content(value) is not None}
  if isinstance(by_name := values.get(_LIST), dict):
    named |= by_name
  found = {name: _content(value) for name, value in named.items()}
  entries = [*((f"{name} is", value) for name, value in named.items()), *((f"{_LIST} has", e) for e in _listed(values))]
  faults = [
    f"{what} {shown(entry)}; must be a string, or an object with a string 'content' and boolean flags"
    for what, entry in entries
    if entry is not None and (_content(entry) is None or not _are_flags(_flags(entry)))
  ]
  if not isinstance(values.get(_LIST, []), list | dict):
    faults.append(f"{_LIST} is {shown(values[_LIST])}; must be a list or an object")
  if faults:
    raise UserError.of(f"{path}: the tokenizer's settings", faults)
  return tuple((name, text) for name, text in found.items() if text is not None)


def add_tokens(backend: tokenizers.Tokenizer, values: Mapping[str, object], path: Path) -> Special:
  """Adds the settings' special tokens to a tokenizer, which may lack them or have them with different flags.

  Returns:
    The named ones.

  Raises:
    UserError: if the settings are malformed, or a token gets a different id from the listed one.
  """
  special = special_of(values, path)
  names = {token for _, token in special}
  listed = by_number(values, path)
  known = {token.content: token.__getstate__() for token in backend.get_added_tokens_decoder().values()}
  new = [token for _, token in sorted(listed.items()) if known.get(token.content) != token.__getstate__()]
  seen = {*known, *(token.content for token in new)}
  by_name = {_content(value): value for value in values.values() if isinstance(value, str | dict)}
  for entry in (*(by_name.get(token, token) for _, token in special), *_listed(values)):
    if (token := _added(entry)).content not in seen:
      seen.add(token.content)
      new.append(token)
  for token in new:
    token.special = token.special or token.content in names
  backend.add_tokens(new)
  if faults := [
    f"it gives {token.content!r} the id {number}, but tokenizer.json gives it {made}"
    for number, token in listed.items()
    if (made := backend.token_to_id(token.content)) != number
  ]:
    raise UserError.of(f"{path}: {_BY_NUMBER} of tokenizer_config.json", faults)
  return special


def by_number(values: Mapping[str, object], path: Path) -> dict[int, tokenizers.AddedToken]:
  """The tokens that the settings list by id.

  Raises:
    UserError: if the list is malformed.
  """
  listed = values.get(_BY_NUMBER, {})
  tokens: dict[int, tokenizers.AddedToken] = {}
  faults = [] if isinstance(listed, dict) else [f"it is {shown(listed)}; must be an object"]
  for number, entry in listed.items() if isinstance(listed, dict) else ():
    content, flags = _content(entry), _flags(entry)
    if content is None or not re.fullmatch("[0-9]{1,99}", number) or not _are_flags(flags):
      faults.append(f"{number!r} is {shown(entry)}; must be a token id and an object with a string 'content'")
    else:
      tokens[int(number)] = tokenizers.AddedToken(content, **flags)
  if faults:
    raise UserError.of(f"{path}: {_BY_NUMBER} of tokenizer_config.json", faults)
  return tokens


def _read(folder: Path, name: str, with_nulls: bool = False) -> dict[str, object]:
  found = read_json(folder / name) if (folder / name).exists() else {}
  return {key: value for key, value in found.items() if with_nulls or value is not None}


def _content(entry: object) -> str | None:
  text = entry.get("content") if isinstance(entry, dict) else entry
  return text if isinstance(text, str) else None


def _listed(values: Mapping[str, object]) -> Iterable[object]:
  listed = values.get(_LIST)
  return listed if isinstance(listed, list) else ()


def _added(entry: object) -> tokenizers.AddedToken:
  """A special token, from a string or an object with flags."""
  return tokenizers.AddedToken(_content(entry), **_flags(entry) | {"special": True})


def _flags(entry: object) -> dict[str, bool]:
  return {name: entry[name] for name in _FLAGS if name in entry} if isinstance(entry, dict) else {}


def _are_flags(flags: dict[str, bool]) -> bool:
  return all(isinstance(flag, bool) for flag in flags.values())
