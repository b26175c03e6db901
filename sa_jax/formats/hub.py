"""Resolves model names: paths, or ids on the Hugging Face hub."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal

from sa_jax.errors import UserError
from sa_jax.files import as_path, check_whole
from sa_jax.formats.extras import EXTRAS, NAMED_TEMPLATES

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


Need = Literal["config", "tokenizer", "weights"]

_CONFIG = ("config.json", "generation_config.json")
_TOKENIZER = (*EXTRAS, f"{NAMED_TEMPLATES}/*.jinja")
_PATTERNS: dict[Need, tuple[str, ...]] = {
  "config": _CONFIG,
  "tokenizer": _TOKENIZER,
  "weights": (*_CONFIG, *_TOKENIZER, "*.index.json", "model*.safetensors"),
}


def parse_hub_id(name: str | Path) -> tuple[str, str | None] | None:
  """The id and the revision of ``org/model@revision``; None for another form, or if a path of that name exists."""
  match = _HUB_ID.fullmatch(str(name))
  return None if match is None or as_path(name).exists() else (match[1], match[2])


def locate(name: str | Path, revision: str | None = None, need: Need = "weights") -> Path:
  """The path of a model, given its path or its id on the Hugging Face hub.

  For a hub id, the required files are downloaded to huggingface_hub's cache, with its token and settings
  (``HF_HUB_OFFLINE``, ``HF_HOME``).

  Args:
    name: a path, or an id such as ``org/model`` or ``org/model@revision``; existing paths take precedence.
    revision: for a hub id: a branch, tag or commit.
    need: which files: only the config, only the tokenizer, or both and the weights.

  Raises:
    UserError: if there is no such path or hub model, a revision is given for a path, or two revisions are given.
  """
  path = as_path(name)
  found = parse_hub_id(name)
  if found is None:
    if not path.exists():
      raise UserError(f"there is no file or folder {path}, and it is not a hub id (org/model)")
    if revision is not None:
      raise UserError(f"revision {revision!r} is for models on the hub, but {name} is a path: leave out `revision`")
    check_whole(path)
    return path
  hub_id, named_revision = found
  if revision is not None and named_revision not in (None, revision):
    raise UserError(f"{name} already contains a revision, but `revision` is {revision!r}; give only one")
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

  # Subfolders and files of other names hold the same weights in other formats.
  others = ["*/*.json", "*/*.safetensors", "*/*.bin"]
  download = functools.partial(snapshot_download, hub_id, revision=named_revision or revision, ignore_patterns=others)
  try:
    files = Path(download(allow_patterns=[*_PATTERNS[need]]))
    if need == "weights" and not any(files.glob("*.safetensors")):
      download(allow_patterns=["pytorch_model*.bin"])
  except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
    first = str(error).strip().split("\n")[0]
    answered = isinstance(error, HfHubHTTPError | HFValidationError)
    fault = "the hub has no such model, or no access to it" if answered else "the hub cannot be reached"
    raise UserError(f"{name} is not a file or folder, and {fault}: {first}") from None
  return files
