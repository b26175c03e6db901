"""``sa-jax generate``: text in, text out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sa_jax.cli.common import console, progress, write_json

if TYPE_CHECKING:
  from sa_jax.convert import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
  """Continue one or more prompts."""

  model: tyro.conf.Positional[Path]
  """A Hugging Face folder, a GGUF file or an sa_jax checkpoint."""
  prompt: tyro.conf.Positional[tuple[str, ...]]
  """One or more prompts."""
  plan: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None
  """Which layers share, such as 22:23-26; None for the checkpoint's own plan."""
  chat: bool = False
  """Put each prompt into the model's chat template, as a user's message."""
  max_new_tokens: int = 128
  """Most tokens to add."""
  temperature: float = 0.0
  """0 takes the likeliest token."""
  top_k: int | None = None
  """Sample from the k likeliest tokens."""
  top_p: float | None = None
  """Sample from the fewest tokens whose probabilities reach p."""
  seed: int = 0
  """Of the samples."""
  dtype: Literal["float32", "bfloat16", "float16"] | None = None
  """Type of parameters and activations; None for the checkpoint's."""
  json: Path | None = None
  """Also write prompts, texts and tokens to this file."""

  def run(self) -> None:
    """Prints each prompt's continuation."""
    from sa_jax import from_pretrained, generate, load_tokenizer
    from sa_jax.decode import right_pad

    tokenizer = load_tokenizer(self.model)
    prompts = [self._prompt(tokenizer, text) for text in self.prompt]
    tokens, lengths = right_pad([tokenizer.encode(text, special=not self.chat) for text in prompts])
    with progress("opening") as report:
      model, params = from_pretrained(self.model, self.plan, self.dtype, layout="layers", progress=report)
    start = time.perf_counter()
    out = generate(
      model,
      params,
      tokens,
      lengths,
      self.max_new_tokens,
      self.temperature,
      self.seed,
      top_k=self.top_k,
      top_p=self.top_p,
    )
    seconds = time.perf_counter() - start
    texts = [tokenizer.decode(row[:length]) for row, length in zip(out.tokens, out.lengths, strict=True)]
    for prompt, text in zip(self.prompt, texts, strict=True):
      console.print(f"[bold]{prompt}[/bold]" if len(texts) > 1 else "", end="\n" if len(texts) > 1 else "")
      console.print(text, markup=False)
    count = int(out.lengths.sum())
    console.print(f"[dim]{count} tokens in {seconds:.1f} s, compilation included; plan {model.plan}[/dim]")
    results = [
      {"prompt": prompt, "text": text, "tokens": row[:length].tolist()}
      for prompt, text, row, length in zip(self.prompt, texts, out.tokens, out.lengths, strict=True)
    ]
    write_json(self.json, {"plan": str(model.plan), "results": results})

  def _prompt(self, tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.chat([{"role": "user", "content": text}]) if self.chat else text
