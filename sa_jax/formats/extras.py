"""The small files of a model's folder: its config, and what travels with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sa_jax.errors import UserError
from sa_jax.files import read_text

EXTRAS = (
  "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What travels with a model besides its config and weights."""


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    UserError: if the file is missing or does not hold a JSON object.
  """
  if not path.exists():
    raise UserError(f"there is no {path.name} in {path.parent}")
  text = read_text(path)
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not readable JSON: {error}") from None
  if not isinstance(values, dict):
    raise UserError(f"{path} must hold a JSON object, and holds a {type(values).__name__}")
  return values


def copy_extras(source: Path, folder: Path) -> None:
  """Copies the `EXTRAS` that a folder has."""
  for name in EXTRAS:
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)
