"""``sa-jax generate``: generate text."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sa_jax.cli.common import console, say, write_json
from sa_jax.cli.sampling import GenerationOpening, Sampling, TemplateOptions, say_tokens, template_options
from sa_jax.cli.texts import read_strings
from sa_jax.errors import UserError
from sa_jax.files import check_writable
from sa_jax.trees import Params

if TYPE_CHECKING:
  from sa_jax import Transformer
  from sa_jax.formats import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
  """Continue one or more prompts."""

  model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
  """A Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id such as org/model."""
  prompt: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT ...")] = ()
  """One or more prompts; - reads one from a pipe."""
  prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """A .jsonl file with a "prompt" per line, or a text file with one prompt."""
  chat: bool = False
  """Apply the model's chat template to each prompt, as a user message."""
  options: TemplateOptions = ()
  """Extra chat-template variables, such as enable_thinking=false."""
  opening: Annotated[GenerationOpening, tyro.conf.arg(name="")] = GenerationOpening()
  """How to open the model."""
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  """How to choose tokens."""
  json: Path | None = None
  """Also write prompts, texts and tokens to this file."""

  def run(self) -> None:
    """Prints each prompt's continuation."""
    self.sampling.check()
    if self.options and not self.chat:
      raise UserError("`options` are for the chat template: add `chat`, or leave them out")
    template_options(self.options)
    check_writable(self.json)
    asked = [sys.stdin.read() if text == "-" else text for text in self.prompt]
    if self.prompts is not None:
      asked += (found := read_strings(self.prompts, "prompt"))
      if not found:
        raise UserError(f"{self.prompts} has no prompts: put a JSON object with a 'prompt' on each line")
    if not asked:
      raise UserError("give at least one prompt: sa-jax generate MODEL PROMPT ..., or a file (`prompts`)")
    self.opening.begin()
    tokenizer = self.opening.tokenizer(self.model)
    encoded = [tokenizer.encode(self._prompt(tokenizer, text), special=not self.chat) for text in asked]
    if empty := [number for number, tokens in enumerate(encoded, 1) if not tokens]:
      raise UserError.of("prompts", [f"number {number} has no tokens" for number in empty])
    model, params = self.opening.ready(self.model)
    start = time.perf_counter()
    if len(encoded) == 1:
      said = [say_tokens(tokenizer, self.sampling.stream(model, params, encoded[0]), self.sampling.stop)]
    else:
      said = self._say_all(model, params, tokenizer, asked, encoded)
    seconds = time.perf_counter() - start
    count = sum(len(tokens) for _, tokens in said)
    took = f"{count} token{'s' * (count != 1)} in {seconds:.1f} s, including compilation"
    console.print(f"{took}; plan {model.plan}", style="dim")
    results = [
      {"prompt": prompt, "text": text, "tokens": tokens} for prompt, (text, tokens) in zip(asked, said, strict=True)
    ]
    write_json(self.json, {"plan": str(model.plan), "results": results})

  def _say_all(
    self, model: Transformer, params: Params, tokenizer: Tokenizer, asked: list[str], encoded: list[list[int]]
  ) -> list[tuple[str, list[int]]]:
    """Prints all prompts and continuations when all are complete; returns texts and tokens."""
    from sa_jax.decode import continue_texts

    said = continue_texts(model, params, tokenizer, encoded, self.sampling.settings())
    for prompt, each in zip(asked, said, strict=True):
      console.print(prompt, style="bold")
      say(each.text)
    return [(each.text, each.tokens) for each in said]

  def _prompt(self, tokenizer: Tokenizer, text: str) -> str:
    options = template_options(self.options)
    return tokenizer.chat([{"role": "user", "content": text}], **options) if self.chat else text
