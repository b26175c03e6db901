"""Distils a mixture of the board; see README.md in this folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from board import Board, Made, add_flags, show
from recovery import further_text
from run import calibration_texts

import sa_jax
from sa_jax.analysis.distilling import Distillation, distill_rows
from sa_jax.analysis.mixture import Mixture


def text_of(board: Board, novels: Path | None, kept: Path | None) -> np.ndarray:
  """Rows to distil on: calibration rows, the rest of their texts, further texts, and novels; stored in a file."""
  flags, opening = board.flags, board.tokenizer.opening()
  if kept is not None and kept.exists():
    return np.load(kept)
  cut = lambda text: sa_jax.rows_of(board.tokenizer.encode(text, special=False), flags.length, None, opening)
  further = [cut(text)[flags.rows + flags.judging :] for text in calibration_texts(flags.data).values()]
  further += [cut(text) for text in further_text(flags.data)]
  if novels is not None:
    further.append(cut(novels.read_text(encoding="utf-8")))
  rows = np.concatenate([*(text.calibration for text in board.texts), *further])
  if kept is not None:
    np.save(kept, rows)
  return rows


def main() -> None:
  """Refits, distils, measures and writes."""
  parser = argparse.ArgumentParser(description=__doc__)
  add_flags(parser)
  add = parser.add_argument
  add("--followers", type=int, required=True, help="of the mixture")
  add("--value-dim", type=int, required=True)
  add("--novels", type=Path, help="the text that `../search/novels.py` made")
  add("--text", type=Path, help="an .npy file that keeps the rows of text")
  add("--steps", type=int, nargs="+", default=[1200], help="each begins from the refitted mixture")
  add("--batch-size", type=int, default=32)
  add("--learning-rate", type=float, default=1.2e-3)
  flags = parser.parse_args()
  jax.config.update("jax_default_matmul_precision", "highest")
  board = Board(flags)
  plans = {len(plan.followers): plan for plan in board.plans()}
  mixture = Mixture(plans[flags.followers] if flags.followers else board.model.plan, flags.value_dim)
  rows = text_of(board, flags.novels, flags.text)
  board.say(f"{len(rows)} rows of text")
  board.measure(mixture)
  made = board.refitted(mixture)
  for steps in flags.steps:
    begun = time.perf_counter()
    how = Distillation(steps=steps, batch_size=flags.batch_size, learning_rate=flags.learning_rate)
    result = distill_rows((made.model, made.params), (board.model, board.params), rows, how)
    seconds = time.perf_counter() - begun
    for cache_dtype in (None, "int8", "int4"):
      kind = mixture._replace(cache_dtype=cache_dtype)
      found = board.times_dense(board.perplexities(Made(made.model, result.params), cache_dtype))
      board.stored["measured"][f"{kind.plan}; {kind}; {steps} steps"] = {
        "mixture": f"{kind}, distilled",
        "part": kind.part(board.model.config),
        "cache_dtype": cache_dtype,
        **found,
        "steps": steps,
        "text_rows": len(rows),
        "losses": [float(np.mean(part)) for part in np.array_split(result.losses, 10)],
        "seconds": seconds,
      }
      board.say(f"{kind}, {steps} steps: {show(found['times_dense'])}  {seconds:.1f} s")
      board.save()


if __name__ == "__main__":
  main()
