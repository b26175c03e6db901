"""Speed of dequantising a GGUF file, by type, in megabytes of output per CPU second; and peak memory.

python experiments/conversion/dequantise.py MODEL.gguf
"""

from __future__ import annotations

import argparse
import collections
import resource
import time
from pathlib import Path

import jax

from sa_jax.formats.gguf_file import GgufFile


def main() -> None:
  """Reads every tensor, one by one, and keeps none."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("model", type=Path)
  flags = parser.parse_args()
  jax.devices()
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
  start, file = peak(), GgufFile(flags.model)
  sizes: collections.Counter[str] = collections.Counter()
  seconds: collections.Counter[str] = collections.Counter()
  largest = 0
  for name in file.shapes:
    begun = time.process_time()
    array = file.read(name)
    kind = str(file.dtypes[name])
    seconds[kind] += time.process_time() - begun
    sizes[kind] += array.nbytes
    largest = max(largest, array.nbytes)
  print(f"{'type':<8} {'MB':>8} {'CPU s':>7} {'MB a CPU s':>11}")
  for kind, size in sizes.most_common():
    print(f"{kind:<8} {size / 1e6:8.1f} {seconds[kind]:7.2f} {size / 1e6 / seconds[kind]:11.0f}")
  print(f"peak {peak() - start:.0f} MB beyond the start; the largest tensor has {largest / 1e6:.0f} MB")


if __name__ == "__main__":
  main()
