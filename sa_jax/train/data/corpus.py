"""Tokenises documents once, in memory or into a memory-mapped disk cache for later runs and other hosts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from sa_jax.errors import UserError
from sa_jax.fields import check_fields
from sa_jax.files import as_path, check_whole, named, new_folder
from sa_jax.formats import Tokenizer
from sa_jax.formats.tokenizer import encodable
from sa_jax.storage import local_copy
from sa_jax.train.data.sources import Document, Documents, Report, read_documents

_TOKEN = np.dtype("<u4")
_AT_ONCE = 256  # documents per call of the tokenizer, which uses all cores
_VERSION = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Tokenised documents, concatenated.

  Attributes:
    tokens: uint32 ``[tokens]``.
    trained: bool ``[tokens]``, whether the loss includes the token.
    offsets: int64 ``[documents + 1]``: document ``d`` is ``tokens[offsets[d] : offsets[d + 1]]``.
    report: counts of what was read.
    start: tokens put at the start of a row that continues a document.
  """

  tokens: np.ndarray
  trained: np.ndarray
  offsets: np.ndarray
  report: Report
  start: tuple[int, ...] = ()

  @functools.cached_property
  def checksum(self) -> int:
    """Checksum of everything that affects training; it changes if the data change."""
    arrays = self.tokens, self.trained, self.offsets
    return functools.reduce(lambda value, array: zlib.crc32(array.data, value), arrays, 0)


@dataclasses.dataclass(frozen=True)
class Reading:
  """How to read files; see `sa_jax.train.data.sources.read_documents`."""

  documents: Documents = "file"
  """A document in a text file: the whole file, or the text between blank lines or <|endoftext|> marks."""
  text_key: str = "text"
  """Key of the text in JSON lines with plain text."""
  skip_bad: bool = False
  """Skip and count unusable lines."""
  start_token: str = "auto"
  """First token of texts and rows: auto for the one that the tokenizer adds, none, or a token."""
  cache: Path | None = None
  """Cache folder for tokenised corpora; None keeps them in memory."""

  def __post_init__(self) -> None:
    check_fields(self, "reading")


def open_corpus(paths: Sequence[Path], tokenizer: Tokenizer, reading: Reading = Reading()) -> Corpus:
  """Reads and tokenises files, or loads them from the cache.

  A cache entry is keyed by the files' contents, the tokenizer and the reading options, and is created atomically.

  Raises:
    UserError: see `read_documents`; or if the cache cannot be written.
  """
  paths = [as_path(path) for path in paths]
  check_files(paths)
  if not paths:
    raise UserError("name at least one file of training data")
  if reading.cache is None:
    return _tokenise(paths, tokenizer, reading)
  entry = as_path(reading.cache) / _key(paths, tokenizer, reading)
  if not (entry / "report.json").exists():
    try:
      with new_folder(entry) as folder:
        _write(folder, paths, tokenizer, reading)
    except ValueError:
      if not (entry / "report.json").exists():  # another process may have been faster
        raise
  return dataclasses.replace(_load(entry), start=tuple(tokenizer.opening(reading.start_token)))


def check_files(paths: Sequence[Path]) -> None:
  """Checks that data files exist.

  Raises:
    UserError: lists the missing ones.
  """
  if missing := [str(path) for path in paths if not path.is_file()]:
    raise UserError(f"there is no file {', '.join(missing)}")


def _key(paths: Sequence[Path], tokenizer: Tokenizer, reading: Reading) -> str:
  digest = hashlib.sha256()
  date = tokenizer.now if tokenizer.chat_template is not None and tokenizer.template.uses_date else None
  options = (
    _VERSION,
    reading.documents,
    reading.text_key,
    reading.skip_bad,
    reading.start_token,
    tokenizer.special,
    str(date),
  )
  for part in (repr(options), tokenizer.backend.to_str(), tokenizer.chat_template or "", repr(tokenizer.templates)):
    digest.update(hashlib.sha256(part.encode()).digest())
  for path in paths:
    with named(path), path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest() + "".join(path.suffixes).encode())
  return digest.hexdigest()[:32]


def _tokenise(paths: Sequence[Path], tokenizer: Tokenizer, reading: Reading) -> Corpus:
  report = Report()
  start = tokenizer.opening(reading.start_token)
  parts = list(encoded(_documents(paths, tokenizer, report, reading), tokenizer, start))
  tokens, trained = (np.concatenate(column) for column in zip(*parts, strict=True))
  lengths = [len(part[0]) for part in parts]
  return Corpus(tokens, trained, np.cumsum([0, *lengths], dtype=np.int64), report, tuple(start))


def _write(folder: Path, paths: Sequence[Path], tokenizer: Tokenizer, reading: Reading) -> None:
  """Fills a cache entry document by document, so that the corpus may be larger than memory."""
  report = Report()
  lengths = [0]
  with (folder / "tokens.bin").open("wb") as tokens, (folder / "trained.bin").open("wb") as trained:
    documents = _documents(paths, tokenizer, report, reading)
    for ids, mask in encoded(documents, tokenizer, tokenizer.opening(reading.start_token)):
      tokens.write(ids.tobytes())
      trained.write(mask.tobytes())
      lengths.append(len(ids))
  with (folder / "offsets.npy").open("wb") as offsets:
    np.save(offsets, np.cumsum(lengths, dtype=np.int64))
  (folder / "report.json").write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")


def _load(entry: Path) -> Corpus:
  try:
    check_whole(entry)
    offsets = np.load(local_copy(entry / "offsets.npy"))
    shape = (int(offsets[-1]),)
    tokens = np.memmap(local_copy(entry / "tokens.bin"), _TOKEN, "r", shape=shape)
    trained = np.memmap(local_copy(entry / "trained.bin"), np.bool_, "r", shape=shape)
    report = Report(**json.loads((entry / "report.json").read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"the tokenised corpus {entry} is damaged ({error}); remove it") from None
  return Corpus(tokens, trained, offsets, report)


def _documents(paths: Sequence[Path], tokenizer: Tokenizer, report: Report, reading: Reading) -> Iterator[Document]:
  options: dict[str, Any] = {name: getattr(reading, name) for name in ("documents", "text_key", "skip_bad")}
  return read_documents(paths, tokenizer, report, **options)


def encoded(
  documents: Iterable[Document], tokenizer: Tokenizer, start: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Each document's tokens, and whether they are trained on: the end token is, the prepended ``start`` is not."""
  token = tokenizer.special_id("eos_token")
  end = [] if token is None else [token]
  iterator = iter(documents)
  while block := list(itertools.islice(iterator, _AT_ONCE)):
    texts = [encodable("".join(piece.text for piece in document.pieces)) for document in block]
    for document, encoded in zip(block, tokenizer.backend.encode_batch(texts, add_special_tokens=False), strict=True):
      ids, mask = np.asarray(encoded.ids, _TOKEN), _trained(document, encoded)
      if not document.complete:
        ids = np.concatenate([np.asarray(start, _TOKEN), ids, np.asarray(end, _TOKEN)])
        mask = np.concatenate([np.zeros(len(start), np.bool_), mask, np.ones(len(end), np.bool_)])
      yield ids, mask


def _trained(document: Document, encoded: tokenizers.Encoding) -> np.ndarray:
  """Which tokens are trained on: a token belongs to the piece that contains its last character."""
  marks = [piece.trained for piece in document.pieces]
  if all(marks):
    return np.ones(len(encoded.ids), np.bool_)
  ends = np.cumsum([len(piece.text) for piece in document.pieces])
  last = np.asarray([stop for _, stop in encoded.offsets], np.int64) - 1
  return np.asarray(marks, np.bool_)[np.searchsorted(ends, last, side="right").clip(max=len(marks) - 1)]
