"""Text written by the dense model, for distillation; see README.md in this folder.

    python experiments/search/written.py --model MODEL --rows rows.npz --count 4096 --out written.npz

Some prompts are the first words of existing rows; the others ask for a scene of a novel with three words from these
rows, if the model has a chat template.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import sa_jax
from sa_jax.formats import Tokenizer

LENGTH = 512
ASKED = (
  "Write a scene of a novel, with dialogue, in which these words occur: {}.",
  "Write a passage from the middle of a novel, told by one of its characters. Use the words: {}.",
  "Continue a story. It should be vivid and it should mention: {}.",
)


def begun(rows: np.ndarray, opening: int, count: int, length: int, generator: np.random.Generator) -> list[np.ndarray]:
  """Prompts: the opening tokens, then ``length`` consecutive tokens from a random position in a row."""
  chosen = generator.integers(len(rows), size=count)
  starts = generator.integers(opening, rows.shape[1] - length, size=count)
  return [
    np.concatenate([rows[row, :opening], rows[row, start : start + length]]) for row, start in zip(chosen, starts)
  ]


def asked(tokenizer: Tokenizer, rows: np.ndarray, count: int, generator: np.random.Generator) -> list[np.ndarray]:
  """Prompts: a user asks for a scene with three words."""
  words = sorted(
    {word for word in tokenizer.decode(rows[::16].reshape(-1)).split() if word.isalpha() and len(word) > 3}
  )
  prompts = []
  for number in range(count):
    text = ASKED[number % len(ASKED)].format(", ".join(generator.choice(words, 3)))
    chat = tokenizer.chat([{"role": "user", "content": text}], prompt=True)
    prompts.append(np.asarray(tokenizer.encode(chat, special=False), np.int32))
  return prompts


def main() -> None:
  """Reads the flags, and writes the rows."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--model", type=Path, required=True)
  add("--rows", type=Path, required=True, help="the .npz file of `recovery.py rows`")
  add("--out", type=Path, required=True)
  add("--count", type=int, default=4096, help="texts")
  add("--asked", type=float, default=0.5, help="the part of them that is asked for")
  add("--batch-size", type=int, default=512)
  add("--temperature", type=float, default=1.0)
  add("--new", type=int, default=448, help="most tokens that are added to a prompt")
  flags = parser.parse_args()
  tokenizer = sa_jax.load_tokenizer(flags.model)
  with np.load(flags.rows) as stored:
    rows = np.concatenate([stored[name] for name in stored.files if not name.startswith(("test", "judge"))])
  generator = np.random.default_rng(0)
  opening = tokenizer.opening()
  wanted = round(flags.asked * flags.count) if tokenizer.chat_template else 0
  prompts = asked(tokenizer, rows, wanted, generator) if wanted else []
  prompts += begun(rows, len(opening), flags.count - len(prompts), 24, generator)
  model, params = sa_jax.from_pretrained(flags.model, "dense", "bfloat16", layout="layers")
  longest = max(map(len, prompts))
  padded = np.stack([np.pad(prompt, (0, longest - len(prompt))) for prompt in prompts]).astype(np.int32)
  lengths = np.asarray([len(prompt) for prompt in prompts])
  texts: list[int] = []
  begin = time.perf_counter()
  order = generator.permutation(len(prompts))
  for number, part in enumerate(np.split(order, range(flags.batch_size, len(order), flags.batch_size))):
    out = sa_jax.generate(
      model, params, padded[part], lengths=lengths[part], max_new_tokens=flags.new, temperature=flags.temperature,
      seed=number, slots=flags.batch_size,
    )  # fmt: skip
    for index, row in enumerate(part):
      # The question is not the kind of text that is wanted.
      prompt = [] if row < wanted else prompts[row][len(opening) :].tolist()
      texts += prompt + np.asarray(out.tokens[index, : int(out.lengths[index])]).tolist()
    print(f"{number}: {len(texts)} tokens, {time.perf_counter() - begin:.1f} s", flush=True)
  written = sa_jax.rows_of(np.asarray(texts, np.int32), LENGTH, None, opening)
  np.savez_compressed(flags.out, written=written)
  for row in written[:: max(1, len(written) // 6)]:
    print(repr(tokenizer.decode(row)[:300]))
  print(written.shape)


if __name__ == "__main__":
  main()
