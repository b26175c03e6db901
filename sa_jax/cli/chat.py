"""``sa-jax chat``: chat with a model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.cli.common import console
from sa_jax.cli.sampling import GenerationOpening, Sampling, TemplateOptions, say_tokens, template_options
from sa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chat:
  """Chat with a model, using its chat template; /new starts over, /exit or Ctrl-D quits, Ctrl-C stops an answer."""

  model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
  """A Hugging Face folder, a GGUF file, an sa_jax checkpoint or a hub id such as org/model."""
  system: str | None = None
  """System message."""
  options: TemplateOptions = ()
  """Extra chat-template variables, such as enable_thinking=false."""
  opening: Annotated[GenerationOpening, tyro.conf.arg(name="")] = GenerationOpening()
  """How to open the model."""
  sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(max_new_tokens=512))
  """How to choose tokens."""

  def run(self) -> None:
    """Answers each input line."""
    self.sampling.check()
    options = template_options(self.options)
    self.opening.begin()
    tokenizer = self.opening.tokenizer(self.model)
    begin = [] if self.system is None else [{"role": "system", "content": self.system}]
    tokenizer.chat([*begin, {"role": "user", "content": "Hello"}], **options)  # report template errors now
    model, params = self.opening.ready(self.model)
    console.print(f"{self.model.stem}, plan {model.plan}; /new starts over, /exit quits", style="dim")
    messages = list(begin)
    while (line := _asked()) is not None:
      if line == "/new":
        messages = list(begin)
        console.print("a new conversation", style="dim")
        continue
      asked = [*messages, {"role": "user", "content": line}]
      try:
        prompt = tokenizer.encode(tokenizer.chat(asked, **options), special=False)
        coming = _until_stopped(self.sampling.stream(model, params, prompt))
        answer, _ = say_tokens(tokenizer, coming, self.sampling.stop)
      except UserError as error:  # too long, or refused by the template: the conversation is unchanged
        console.print(f"{error}; /new starts over", style="red")
        continue
      messages = [*asked, {"role": "assistant", "content": answer.strip()}]


def _until_stopped(coming: Iterator[int]) -> Iterator[int]:
  """Yields until Ctrl-C, which stops the answer but not the conversation."""
  try:
    yield from coming
  except KeyboardInterrupt:
    return


def _asked() -> str | None:
  """The next non-empty line, or None at the end."""
  terminal = sys.stdin.isatty()
  if terminal:
    import readline  # noqa: F401  # gives `input` history and editing
  while True:
    try:
      line = input("> " if terminal else "").strip()
    except EOFError:
      return None
    if line == "/exit":
      return None
    if line:
      return line
