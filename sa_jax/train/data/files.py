"""Reads objects or lines of text from files: JSON, JSON lines, Parquet, Arrow, ArrayRecord; unpacks gzip and zstd."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from sa_jax.errors import UserError
from sa_jax.files import is_remote, named
from sa_jax.storage import local_copy

TABLES = (".parquet", ".arrow", ".array_record")
_PACKED = (".gz", ".zst")
_ROWS = 1024
"""Table rows in memory."""


def kind(path: Path) -> str:
  """The suffix of a file's format, ignoring compression."""
  return (path.with_suffix("") if path.suffix in _PACKED else path).suffix


def lines(path: Path) -> Iterator[bytes]:
  """The lines of a file, decompressed.

  Raises:
    UserError: if it cannot be read.
  """
  try:
    with named(path), path.open("rb") as packed, _unpacked(packed, path) as file:
      yield from file
  except (EOFError, zlib.error) as error:
    raise UserError(f"cannot read {path}: {error}") from None


def _unpacked(file: BinaryIO, path: Path) -> BinaryIO | io.BufferedReader | gzip.GzipFile:
  if path.suffix == ".gz":
    return gzip.GzipFile(fileobj=file)
  if path.suffix == ".zst":
    return io.BufferedReader(_pyarrow(path).input_stream(file, compression="zstd"))
  return file


def objects(path: Path, keys: Collection[str]) -> Iterator[tuple[str, object]]:
  """Each object of a file: raw lines of ``.jsonl``, records of ``.array_record``, values of ``.json``, table rows.

  Args:
    path: the file.
    keys: the table columns to read.

  Yields:
    The object's location, for messages, and the object, or its JSON bytes.

  Raises:
    UserError: if the file cannot be read.
  """
  suffix = kind(path)
  if suffix in TABLES:
    try:
      yield from _records(path) if suffix == ".array_record" else _rows(path, keys)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
      if isinstance(error, UserError):
        raise
      raise UserError(f"cannot read {path}: {' '.join(str(error).split()) or 'it is damaged'}") from None
  elif suffix == ".jsonl":
    for number, line in enumerate(lines(path), 1):
      if line.strip():
        yield f"line {number}", line
  else:
    yield from _values(path)


def _values(path: Path) -> Iterator[tuple[str, object]]:
  try:
    values = json.loads(b"".join(lines(path)) or b"[]")
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise UserError(f"{path} is not JSON: {error}") from None
  if not isinstance(values, list):
    raise UserError(f"{path} holds a JSON {type(values).__name__}; must be a list of objects")
  for index, value in enumerate(values):
    yield f"entry {index}", value


def _rows(path: Path, keys: Collection[str]) -> Iterator[tuple[str, object]]:
  """Rows of a table, by pyarrow; Arrow files may be streams, as datasets saves them, or random-access files."""
  arrow = _pyarrow(path)
  number = 0
  if path.suffix == ".parquet":
    file = importlib.import_module("pyarrow.parquet").ParquetFile(path.open("rb") if is_remote(path) else path)
    columns = [name for name in file.schema_arrow.names if name in keys]
    batches = file.iter_batches(batch_size=_ROWS, columns=columns or None)
  else:
    ipc = importlib.import_module("pyarrow.ipc")
    mapped = arrow.PythonFile(path.open("rb")) if is_remote(path) else arrow.memory_map(str(path))
    if mapped.read(6) == b"ARROW1":
      reader = ipc.open_file(mapped)
      batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
      mapped.seek(0)
      batches = ipc.open_stream(mapped)
  for batch in batches:
    chosen = [name for name in batch.schema.names if name in keys]
    for start in range(0, batch.num_rows, _ROWS):
      for row in (batch.select(chosen) if chosen else batch).slice(start, _ROWS).to_pylist():
        yield f"row {number}", row
        number += 1


def _records(path: Path) -> Iterator[tuple[str, object]]:
  """Records of an ArrayRecord file, each a JSON object."""
  try:
    module = importlib.import_module("array_record.python.array_record_module")
  except ImportError as error:
    raise UserError(f"{path} is read with array_record ({error}): pip install 'sa-jax[train]'") from None
  reader = module.ArrayRecordReader(str(local_copy(path)))
  try:
    for start in range(0, reader.num_records(), _ROWS):
      records = reader.read([*range(start, min(start + _ROWS, reader.num_records()))])
      for index, record in enumerate(records, start):
        yield f"record {index}", record
  finally:
    reader.close()


def _pyarrow(path: Path) -> ModuleType:
  try:
    return importlib.import_module("pyarrow")
  except ImportError as error:
    raise UserError(f"{path} is read with pyarrow ({error}): pip install 'sa-jax[data]'") from None
