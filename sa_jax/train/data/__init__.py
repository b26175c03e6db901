"""Training data: files → documents → tokens → rows → batches on devices."""

from sa_jax.train.data.bytes import BYTE_VOCABULARY, byte_tokenizer
from sa_jax.train.data.corpus import Corpus, Reading, open_corpus
from sa_jax.train.data.packing import PackedRows, make_rows, pack
from sa_jax.train.data.pipeline import BatchIterator, every_row_once, host_rows, shuffled, to_devices
from sa_jax.train.data.sources import Document, Piece, Report, read_documents
from sa_jax.train.data.stream import Cursor, Examples, Gathered, Part, Shape, Stream, hub_dataset

__all__ = [
  "BYTE_VOCABULARY",
  "BatchIterator",
  "Corpus",
  "Cursor",
  "Document",
  "Examples",
  "Gathered",
  "Part",
  "Piece",
  "Reading",
  "Report",
  "PackedRows",
  "Shape",
  "Stream",
  "byte_tokenizer",
  "host_rows",
  "hub_dataset",
  "every_row_once",
  "make_rows",
  "open_corpus",
  "pack",
  "read_documents",
  "shuffled",
  "to_devices",
]
