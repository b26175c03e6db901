"""Writes docs/transcripts-80.md and docs/transcripts-120.md: each command in a terminal of 80 and of 120 columns.

    python docs/transcripts.py            (needs tmux, and the extras eval, plots and train)

Everything is typed into a terminal (tmux), in a folder of its own, and copied from its screen: a first try, a mistake,
and where there is something to interrupt, an interruption and what the same command does after it. The model is a tiny
random one that this script makes, so the texts that it writes mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
WORDS = "the a cat dog bird sits runs sees on in under mat tree house old small red and then slowly".split()
STARTS = ("<s>", "</s>", "<unk>", "user", "assistant")


class Typed(NamedTuple):
  """A line that is typed.

  Attributes:
    line: after the prompt.
    after: shows on the screen before ``keys`` are sent; None where nothing more is typed.
    keys: as tmux calls them, one each time that ``after`` has shown.
  """

  line: str
  after: str | None = None
  keys: tuple[str, ...] = ()


SECTIONS: dict[str, Sequence[Typed]] = {
  "The program": (
    Typed("sa-jax --version"),
    Typed("sa-jax generat model 'the cat'"),
    Typed("sa-jax cost --lenght 64 model"),
  ),
  "convert": (
    Typed("sa-jax convert model --inspect --plan 2:3"),
    Typed("sa-jax convert model shared --plan 2:3 --dtype float32"),
    Typed("sa-jax convert model shared --plan 2:3"),
    Typed("sa-jax convert model other --plan 2:4"),
  ),
  "export": (Typed("sa-jax export shared exported"), Typed("sa-jax export model/none exported")),
  "push": (Typed("HF_HUB_OFFLINE=1 sa-jax push shared nobody/model"),),
  "generate": (
    Typed("sa-jax generate model 'the cat sits' --max-new-tokens 12"),
    Typed("echo 'the old dog' | sa-jax generate shared - --max-new-tokens 8 2>/dev/null | head -1"),
    Typed("sa-jax generate model 'the cat' --max-new-tokens 0"),
    Typed("sa-jax generate no-such-model 'the cat'"),
  ),
  "chat": (
    Typed("sa-jax chat model --max-new-tokens 8", "> ", ("the dog runs", "Enter", "/exit", "Enter")),
    Typed("sa-jax chat model --top-p 2"),
  ),
  "perplexity": (
    Typed("sa-jax perplexity model text.txt --plan dense 2:3 --length 32 --rows 20"),
    Typed("sa-jax perplexity model texte.txt --length 32"),
    Typed("sa-jax perplexity model text.txt --length 32 --json none/out.json"),
  ),
  "eval": (
    Typed("sa-jax eval model --tasks choose finish --include-path tasks --plan dense 2:3 --resume answers"),
    Typed("sa-jax eval model --tasks choose finish --include-path tasks --plan dense 2:3 --resume answers"),
    Typed("sa-jax eval model --tasks chose --include-path tasks --limit 0"),
  ),
  "cost": (
    Typed("sa-jax cost llama-2-7b --plan 26:27-30 --length 4096"),
    Typed("sa-jax cost llama2-7b --plan 26:27-30"),
    Typed("sa-jax cost llama-2-7b --plan 26:28"),
  ),
  "analyze": (Typed("sa-jax analyze text.txt model --length 32 --rows 2"), Typed("sa-jax analyze text.txt")),
  "search": (
    Typed("sa-jax search model text.txt --budget 1 --effort quick --length 32 --record record.json"),
    Typed("sa-jax search model text.txt --budget 1 --effort quick --length 32 --record record.json"),
    Typed("sa-jax search model text.txt --budget kv=1%"),
  ),
  "align": (Typed("sa-jax align model 2:3 text.txt --length 32"), Typed("sa-jax align model 2:3")),
  "refit": (
    Typed("sa-jax refit model 2:3 text.txt --length 32 --out refitted"),
    Typed("sa-jax refit model 2:3 text.txt --length 32 --out refitted"),
  ),
  "share": (
    Typed("sa-jax share model text.txt --budget 1 --effort quick --length 32 --out best"),
    Typed("sa-jax share model short.txt --budget 1 --length 32 --out other"),
  ),
  "train": (
    Typed(
      "sa-jax train --model model --train text.txt --out run --length 32 --batch-size 4 --steps 60 --log-every 20",
      "step 20/60 ",
      ("C-c",),
    ),
    Typed("sa-jax train --model model --train text.txt --out run --length 32 --batch-size 4 --steps 60 --log-every 20"),
    Typed("sa-jax train --model model --train text.txt --out run --length 32 --batch-size 0 --steps 60"),
  ),
  "fit": (
    Typed("sa-jax fit smollm2-135m --topology v5e:2x2 --plan 25:26-29 --kind decode --length 256"),
    Typed("sa-jax fit smollm2-135m --topology v5e:2x2 --mesh tensor=3"),
  ),
  "doctor": (Typed("sa-jax doctor . --mesh data=1"), Typed("sa-jax doctor --mesh fsdp=3")),
  "bench": (
    Typed("sa-jax bench decode --model smollm2-135m --plan dense 25:26-29 --length 64 --batch-size 1"),
    Typed("sa-jax bench decode --model smollm2-135m --batch-size 0"),
  ),
  "demo": (
    Typed("sa-jax demo --model model --plan 2:3 --question 'the cat sits' --max-new-tokens 8"),
    Typed("sa-jax demo --model model --plan 2:9"),
  ),
}


def make_files(folder: Path) -> None:
  """A tiny model with a tokenizer and a chat template, texts, and two tasks of lm-eval."""
  import jax
  import numpy as np
  from tokenizers import Tokenizer as Backend
  from tokenizers import models, pre_tokenizers

  import sa_jax
  from sa_jax.formats.tokenizer import Tokenizer

  vocabulary = {word: number for number, word in enumerate((*STARTS, *WORDS))}
  backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  template = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}assistant"
  sizes = {"embed_dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 128}
  config = sa_jax.ModelConfig(vocab_size=len(vocabulary), max_length=256, eos_token_ids=(1,), bos_token_id=0, **sizes)
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.dense(4))
  params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  params = jax.tree.map(lambda leaf: leaf * (6 if leaf.ndim > 2 else 1), jax.tree.map(np.asarray, params))
  special = (("bos_token", "<s>"), ("eos_token", "</s>"))
  sa_jax.save(folder / "model", model, params, Tokenizer(backend, template, special))

  rng = np.random.default_rng(0)
  say = lambda count: " ".join(rng.choice(WORDS, count))
  (folder / "text.txt").write_text("\n".join(say(12) + "." for _ in range(300)).replace(".", " ."), encoding="utf-8")
  (folder / "short.txt").write_text(say(20), encoding="utf-8")
  (folder / "tasks").mkdir()
  docs = [{"question": say(4), "options": [say(3), say(3)], "label": int(rng.integers(2))} for _ in range(40)]
  (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
  data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\ntest_split: test\n"
  (folder / "tasks" / "choose.yaml").write_text(
    data + "task: choose\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: label\n"
    "doc_to_choice: options\nmetric_list: [{metric: acc}]\n"
  )
  (folder / "tasks" / "finish.yaml").write_text(
    data + "task: finish\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{options[0]}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 5}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
  )


class Terminal:
  """A shell in tmux, of its own server."""

  def __init__(self, folder: Path, width: int) -> None:
    self._name = f"sa-jax-transcripts-{os.getpid()}-{width}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PS1": "$ ", "PROMPT_COMMAND": f"tmux -L {self._name} wait-for -S prompt"}
    environment |= {"HOME": str(folder), "TERM": "tmux-256color", "HISTFILE": ""}
    environment |= {"JAX_PLATFORMS": "cpu", "SA_JAX_COMPILATION_CACHE": str(folder.parent / "compiled")}
    keep = {key: os.environ[key] for key in ("PYTHONPATH", "LANG", "HF_HOME") if key in os.environ}
    words = [f"{key}={value}" for key, value in (keep | {"LANG": "C.UTF-8"} | environment).items()]
    self._tmux("new-session", "-d", "-x", str(width), "-y", "160", "-c", str(folder), "env", "-i", *words,
               "bash", "--norc", "--noprofile")  # fmt: skip
    self._tmux("wait-for", "prompt")

  def _tmux(self, *arguments: str) -> str:
    words = ["tmux", "-L", self._name, *arguments]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=600)
    return done.stdout

  def screen(self) -> str:
    """What it shows, without the prompt that waits."""
    return self._tmux("capture-pane", "-p").rstrip().removesuffix("$").rstrip()

  def type(self, typed: Typed) -> str:
    """Types a line; returns the screen once the next prompt is there."""
    self._tmux("send-keys", "C-l")
    time.sleep(0.2)
    self._tmux("clear-history")
    self._tmux("send-keys", "-l", typed.line)
    self._tmux("send-keys", "Enter")
    if typed.after is not None:
      self._wait_for(typed.after)
      for number, keys in enumerate(typed.keys, start=1):
        self._tmux("send-keys", keys)
        if keys == "Enter" and number < len(typed.keys):
          self._wait_for(typed.after, number)
    self._tmux("wait-for", "prompt")
    time.sleep(0.2)
    return self.screen()

  def _wait_for(self, text: str, lines: int = 1) -> None:
    """Waits until so many lines of the screen, without the command's own, begin with a text or have it."""
    for _ in range(3000):
      if sum(text in f"{line} " for line in self.screen().splitlines()[1:]) >= lines:
        return
      time.sleep(0.1)
    raise TimeoutError(f"{text!r} never showed:\n{self.screen()}")

  def close(self) -> None:
    """Ends it."""
    self._tmux("kill-server")


def record(width: int, sections: Sequence[str], above: Path) -> dict[str, str]:
  """What a terminal of a width shows of each section, typed in a folder of ``above``."""
  folder = above.resolve() / str(width)
  folder.mkdir()
  make_files(folder)
  terminal = Terminal(folder, width)
  found = {}
  try:
    for section in sections:
      shown = "\n\n".join(f"```text\n{terminal.type(typed)}\n```" for typed in SECTIONS[section])
      shown = shown.replace(str(folder), "~")
      found[section] = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "host", shown)
      print(f"{width}: {section}", flush=True)
  finally:
    terminal.close()
  return found


def write(path: Path, width: int, recorded: dict[str, str]) -> None:
  """Writes the page of a width; sections that were not recorded stay as they are in it."""
  stored = path.read_text(encoding="utf-8") if path.exists() else ""
  parts = (part.partition("\n\n") for part in stored.split("\n## ")[1:])
  known = {name: text.strip() for name, _, text in parts} | recorded
  head = (
    f"# Transcripts at {width} columns\n\nEach command in a terminal of {width} columns, copied from its screen by\n"
    "`docs/transcripts.py`. The model is tiny and random, so that texts mean nothing; times are of two busy cores.\n"
  )
  body = "".join(f"\n## {name}\n\n{known[name]}\n" for name in SECTIONS if name in known)
  path.write_text(head + body, encoding="utf-8")


def main() -> None:
  """Writes the pages."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--width", type=int, nargs="+", default=[80, 120])
  parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION",
                      help="export and generate use what convert makes")  # fmt: skip
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as above:
    for width in arguments.width:
      write(HERE / f"transcripts-{width}.md", width, record(width, arguments.only, Path(above)))


if __name__ == "__main__":
  main()
