"""The small files of a model's folder: its config, tokenizer, chat templates and the like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sa_jax.errors import UserError
from sa_jax.files import check_regular, copy, named, read_text

EXTRAS = (
  "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "special_tokens_map.json",
  "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
  "generation_config.json",
)  # fmt: skip
"""Files that go with a model besides its config and weights."""

NAMED_TEMPLATES = "additional_chat_templates"
"""The folder of a model's named chat templates, one per file."""

_MOST_BYTES = 2**28  # several times the size of the largest tokenizers


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object from a file.

  Raises:
    UserError: if the file is missing or is not a JSON object.
  """
  if not path.exists():
    raise UserError(f"there is no {path.name} in {path.parent}")
  check_small(path)
  text = read_text(path)
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable JSON: {error}") from None
  if not isinstance(values, dict):
    raise UserError(f"{path} must contain a JSON object, not a {type(values).__name__}")
  return values


def check_small(path: Path) -> None:
  """Checks that the file of a config or tokenizer is a regular file of reasonable size.

  Raises:
    UserError: if it is a pipe, a device or a folder, or too large.
  """
  check_regular(path, _MOST_BYTES)


def copy_extras(source: Path, folder: Path) -> None:
  """Copies the `EXTRAS` of a folder.

  Raises:
    UserError: if one is a link to a file elsewhere, which is not part of the model. Links within the hub's cache are
      allowed.
  """
  home = source.resolve()
  # CACHE/models--ORG--NAME/snapshots/COMMIT links to CACHE/models--ORG--NAME/blobs.
  homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
  templates = [f"{NAMED_TEMPLATES}/{file.name}" for file in sorted((source / NAMED_TEMPLATES).glob("*.jinja"))]
  for name in (*EXTRAS, *templates):
    file = source / name
    if not file.exists():
      continue
    if not any(file.resolve().is_relative_to(each) for each in homes):
      raise UserError(f"{file} is a link to {file.resolve()}, outside its folder; copy that file there, or remove it")
    check_small(file)
    with named(file):
      (folder / name).parent.mkdir(exist_ok=True)
      copy(file, folder / name)
