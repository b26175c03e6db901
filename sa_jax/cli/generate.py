"""``sa-jax generate``: text in, text out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sa_jax.cli.common import console, progress, write_json
from sa_jax.errors import UserError
from sa_jax.files import check_writable

if TYPE_CHECKING:
  from sa_jax import Transformer
  from sa_jax.formats import Tokenizer


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
  cache_dtype: Literal["int8"] | None = None
  """int8 caches keys and values in about half of bfloat16's bytes; None in the type of activations."""
  json: Path | None = None
  """Also write prompts, texts and tokens to this file."""

  def run(self) -> None:
    """Prints each prompt's continuation."""
    from sa_jax import Transformer, from_pretrained, load_tokenizer

    if not self.prompt:
      raise UserError("name at least one prompt: sa-jax generate MODEL PROMPT ...")
    check_writable(self.json)
    tokenizer = load_tokenizer(self.model)
    prompts = [tokenizer.encode(self._prompt(tokenizer, text), special=not self.chat) for text in self.prompt]
    with progress("opening") as report:
      model, params = from_pretrained(self.model, self.plan, self.dtype, layout="layers", progress=report)
    model = Transformer(dataclasses.replace(model.config, cache_dtype=self.cache_dtype), model.plan)
    start = time.perf_counter()
    say = self._say_one if len(prompts) == 1 else self._say_all
    tokens = say(model, params, tokenizer, prompts)
    seconds = time.perf_counter() - start
    count = sum(map(len, tokens))
    console.print(f"[dim]{count} tokens in {seconds:.1f} s, compilation included; plan {model.plan}[/dim]")
    results = [
      {"prompt": prompt, "text": tokenizer.decode(row), "tokens": row}
      for prompt, row in zip(self.prompt, tokens, strict=True)
    ]
    write_json(self.json, {"plan": str(model.plan), "results": results})

  def _say_one(
    self, model: Transformer, params: Any, tokenizer: Tokenizer, prompts: list[list[int]]
  ) -> list[list[int]]:
    """Prints one continuation as it comes."""
    from sa_jax.decode import stream

    tokens: list[int] = []
    said = ""
    sampling: dict[str, Any] = {"top_k": self.top_k, "top_p": self.top_p}
    for new in stream(model, params, prompts[0], self.max_new_tokens, self.temperature, self.seed, **sampling):
      tokens += new
      text = tokenizer.decode(tokens)
      # A character of several tokens is not complete yet.
      if not text.endswith("\ufffd"):
        # Not by rich, which would expand tabs and what looks like emoji names.
        print(text[len(said) :], end="", flush=True)
        said = text
    print(tokenizer.decode(tokens)[len(said) :], flush=True)
    return [tokens]

  def _say_all(
    self, model: Transformer, params: Any, tokenizer: Tokenizer, prompts: list[list[int]]
  ) -> list[list[int]]:
    """Prints every prompt and its continuation, once all are there."""
    from sa_jax import generate
    from sa_jax.decode import right_pad

    sampling: dict[str, Any] = {"top_k": self.top_k, "top_p": self.top_p}
    out = generate(model, params, *right_pad(prompts), self.max_new_tokens, self.temperature, self.seed, **sampling)
    tokens = [row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)]
    for prompt, row in zip(self.prompt, tokens, strict=True):
      console.print(prompt, style="bold", markup=False, emoji=False)
      print(tokenizer.decode(row), flush=True)
    return tokens

  def _prompt(self, tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.chat([{"role": "user", "content": text}]) if self.chat else text
