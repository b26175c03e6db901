"""Files as data sets have them: packed, tables, records."""

import gzip
import json

import pytest

from sa_jax import UserError
from sa_jax.train import data
from sa_jax.train.data import Reading

pyarrow = pytest.importorskip("pyarrow")

from pyarrow import ipc, parquet  # noqa: E402

ROWS = [{"text": f"text {number}", "id": number} for number in range(3000)]
CHATS = [
  {"messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": "n"}]},
]
TEMPLATE = (
  "{% for m in messages %}<{{ m.role }}>{% if 'name' in m %}{{ m.name }}:{% endif %}{{ m.content }}{% endfor %}"
)


def write(path, rows):
  """The rows in the form that the name of a file says."""
  lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
  table = pyarrow.Table.from_pylist(rows)
  suffixes = "".join(path.suffixes)
  if suffixes == ".parquet":
    parquet.write_table(table, path, row_group_size=700)
  elif suffixes == ".arrow":
    make = ipc.new_stream if path.stem == "stream" else ipc.new_file
    with make(str(path), table.schema) as sink:
      sink.write_table(table, max_chunksize=900)
  elif suffixes == ".array_record":
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:10")
    for row in rows:
      writer.write(json.dumps(row).encode())
    writer.close()
  elif suffixes.endswith(".gz"):
    path.write_bytes(gzip.compress(lines))
  elif suffixes.endswith(".zst"):
    with pyarrow.output_stream(str(path), compression="zstd") as sink:
      sink.write(lines)
  else:
    path.write_bytes(lines)
  return path


NAMES = ["a.parquet", "stream.arrow", "file.arrow", "a.array_record", "a.jsonl.gz", "a.jsonl.zst"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_as_of_json_lines(tmp_path, name):
  tokenizer = data.byte_tokenizer()
  plain = data.open_corpus([write(tmp_path / "plain.jsonl", ROWS)], tokenizer)
  found = data.open_corpus([write(tmp_path / name, ROWS)], tokenizer)
  assert found.checksum == plain.checksum
  assert found.report == plain.report


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_chats_of_tables(tmp_path, name):
  """In a table every message has all keys; those that are null are absent."""
  tokenizer = data.byte_tokenizer()
  tokenizer = type(tokenizer)(tokenizer.backend, TEMPLATE)
  corpus = data.open_corpus([write(tmp_path / name, CHATS)], tokenizer)
  assert bytes(corpus.tokens.tolist()).decode() == "<user>q<assistant>n:a"


def test_packed_text(tmp_path):
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress("naïve\n\ntext".encode()))
  corpus = data.open_corpus([tmp_path / "a.txt.gz"], data.byte_tokenizer(), Reading(documents="blank_lines"))
  assert corpus.report.documents == 2


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(tmp_path, name):
  """One line that names the file, whether it is cut short or something else altogether."""
  whole = write(tmp_path / name, ROWS).read_bytes()
  for contents in (whole[: len(whole) // 2], b"not this", whole[:40] + b"\xff" * 4000):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=name) as caught:
      data.open_corpus([tmp_path / name], data.byte_tokenizer())
    assert len(str(caught.value).splitlines()) == 1


def test_a_table_with_other_columns(tmp_path):
  file = write(tmp_path / "a.parquet", [{"txt": "a", "id": 1}])
  with pytest.raises(UserError, match=r"a.parquet, row 0: it has the keys \['id', 'txt'\]"):
    data.open_corpus([file], data.byte_tokenizer())
