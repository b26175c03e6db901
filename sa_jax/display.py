"""Formatting for users: numbers, progress bars, and notebook tables and pictures.

HTML is in small self-contained pieces. Colours are inherited (``currentColor``), so that they work on light and dark
pages.
"""

from __future__ import annotations

import base64
import contextlib
import html
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import numpy as np

Progress = Callable[[int, int], None]
"""Takes (done, total)."""

_STEP = 24  # pixels from layer to layer
_ANCHOR = '<circle cx="{x}" cy="14" r="6" fill="currentColor"/>'
_FOLLOWER = '<path d="M{before} 14H{after}"/><circle cx="{x}" cy="14" r="5" fill="none"/>'
_LIGHT, _DARK = (255, 255, 255), (0, 77, 64)


@contextlib.contextmanager
def progress(label: str, *, shown: bool = True) -> Iterator[Progress]:
  """A progress bar, in a terminal (on stderr) or in a notebook; elsewhere nothing is shown.

  Many functions take what it yields as their ``progress``:

      with sa_jax.progress("comparing layers") as bar:
        layer_similarity(model, params, tokens, progress=bar)

  Args:
    label: what is being done.
    shown: whether to show a bar at all.

  Yields:
    A function that takes (done, total).
  """
  from rich.console import Console

  from sa_jax.bars import bar

  screen = Console(stderr=True)
  visible = shown and (screen.is_interactive or screen.is_jupyter)
  with bar(label, screen) if visible else contextlib.nullcontext(lambda done, total: None) as report:
    yield report


def quantity(value: float, unit: str = "") -> str:
  """A number with three digits and a decimal prefix, such as ``13.5 G``, and a unit."""
  prefixes = ["", "k", "M", "G", "T", "P"]
  while abs(value) >= 999.5 and len(prefixes) > 1:
    value /= 1000
    prefixes.pop(0)
  prefix = prefixes[0]
  digits = 0 if prefix == "" and value == int(value) else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
  return f"{value:.{digits}f} {prefix}{unit}".rstrip()


def count(number: int, noun: str) -> str:
  """A number and its noun, such as ``1 row`` and ``1,140 rows``; the plural takes an s."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> str:
  """A table: the first column names the row, the others are numbers.

  Args:
    rows: one text per column.
    columns: headings; empty for none.
  """
  head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
  body = "".join(
    f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th>'
    + "".join(f'<td style="text-align:right">{html.escape(value)}</td>' for value in values)
    + "</tr>"
    for name, *values in rows
  )
  return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def layers_picture(source: Sequence[int], title: str) -> str:
  """The layers in a row: anchors as discs, followers as rings tied to the layer before, a number below every fifth.

  Args:
    source: per layer, the layer whose attention weights it uses.
    title: the caption, also read by screen readers.
  """
  parts = []
  for layer, anchor in enumerate(source):
    x = 14 + _STEP * layer
    parts.append((_ANCHOR if layer == anchor else _FOLLOWER).format(x=x, before=x - _STEP + 6, after=x - 6))
    if layer % 5 == 0:
      parts.append(f'<text x="{x}" y="38" fill="currentColor" stroke="none">{layer}</text>')
  width = 28 + _STEP * (len(source) - 1)
  said = html.escape(title)
  return (
    f'<figure style="margin:0"><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 44" role="img" '
    f'style="width:{width}px;max-width:100%;height:auto" stroke="currentColor" stroke-width="2" '
    f'text-anchor="middle" font-size="11" font-family="sans-serif"><title>{said}</title>{"".join(parts)}</svg>'
    f"<figcaption>{said} (● anchor, ─○ follower)</figcaption></figure>"
  )


def maps_picture(maps: Sequence[tuple[str, np.ndarray]]) -> str:
  """Matrices ``[L, L]`` side by side as images with one pixel per entry, white at 0 and dark at 1 and beyond.

  Args:
    maps: titles and matrices.
  """
  figures = []
  for title, values in maps:
    size = f"{len(values)} × {len(values)} layers"
    image = base64.b64encode(_png(values)).decode()
    figures.append(
      '<figure style="margin:0.5em;display:inline-block">'
      f'<img alt="{html.escape(title)}, {size}, white is 0 and dark is 1" '
      f'style="width:15em;image-rendering:pixelated" src="data:image/png;base64,{image}"/>'
      f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )
  return f"<div>{''.join(figures)}</div>"


def _png(values: np.ndarray) -> bytes:
  """A PNG file of numbers in 0 to 1, ``[rows, columns]``."""
  rows, columns = values.shape
  shade = values.clip(0, 1)[..., None]
  pixels = (shade * _DARK + (1 - shade) * _LIGHT).round().astype("uint8")

  def part(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)  # eight bits of red, green and blue
  lines = b"".join(b"\0" + row.tobytes() for row in pixels)
  return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(lines, 9)) + part(b"IEND", b"")
