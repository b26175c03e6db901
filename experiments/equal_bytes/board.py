"""Refits and measures mixtures, for the scripts in this folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import sa_jax
from sa_jax.analysis import Judge, Text, walk
from sa_jax.analysis.mixture import Mixture
from sa_jax.analysis.refit import Refit, refit
from sa_jax.config import CacheDtype
from sa_jax.formats.hf_plan import write_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "search"))
from run import calibration_texts, test_texts

Json = dict[str, Any]


class Made(NamedTuple):
  """A refitted model.

  Attributes:
    model: without the cache dtype.
    params: in the layer layout.
  """

  model: sa_jax.Transformer
  params: Any


class Board:
  """The model, the texts, and the measurements, which are stored in a file across runs.

  Args:
    flags: see `add_flags`.
  """

  def __init__(self, flags: argparse.Namespace):
    self.flags, self.begun = flags, time.perf_counter()
    self.model, self.params = sa_jax.from_pretrained(flags.model, "dense", "float32", layout="layers")
    self.params = jax.tree.map(jax.numpy.asarray, self.params)
    self.config = walk.walking(self.model, self.params)
    self.tokenizer = sa_jax.load_tokenizer(flags.model)
    encode = lambda text, rows: self.tokenizer.encode(text[: 8 * flags.length * rows], special=False)
    split = lambda text, rows: sa_jax.rows_of(encode(text, rows), flags.length, rows, self.tokenizer.opening())
    rows, judging = flags.rows + flags.judging, flags.judging
    self.texts = [
      Text(name, *np.split(split(text, rows), [rows - judging])) for name, text in calibration_texts(flags.data).items()
    ]
    self.rows = {("judging", text.name): text.judging for text in self.texts}
    self.rows |= {("test", name): split(text, flags.test) for name, text in test_texts(flags.data).items()}
    self.dense = self.perplexities(Made(self.model, self.params), None)
    self.made: dict[Mixture, Made] = {Mixture(self.model.plan): Made(self.model, self.params)}
    self.stored: Json = {"settings": self.settings(), "rows": [], "measured": {}}
    if flags.out.exists():
      stored = json.loads(flags.out.read_text(encoding="utf-8"))
      for name in ("model", "rows", "length", "local_epochs"):
        if stored["settings"][name] != self.stored["settings"][name]:
          raise SystemExit(f"{flags.out} has another {name}, {stored['settings'][name]}: choose another --out")
      self.stored |= {name: each for name, each in stored.items() if name != "settings"}
    self.say(f"dense {self.dense}")

  def say(self, text: str) -> None:
    """Prints a line with the time."""
    print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", flush=True)

  def plans(self) -> list[sa_jax.SharingPlan]:
    """The plans of the search that the flags name, fewest followers first."""
    stored = json.loads(self.flags.plans.read_text(encoding="utf-8"))["results"]
    found = sorted(stored.items(), key=lambda each: int(each[0]))
    return [sa_jax.SharingPlan.parse(each["plan"], self.config.num_layers) for _, each in found]

  def judge(self) -> Judge:
    """Measures candidates, on few rows."""
    few = [text._replace(calibration=text.calibration[: self.flags.search_rows]) for text in self.texts]
    return Judge(self.model, self.params, few, Refit(), chunk=self.flags.chunk, record=self.flags.record)

  def perplexities(self, made: Made, cache_dtype: CacheDtype) -> dict[str, dict[str, float]]:
    """Perplexities on held-out and test rows, by text, with keys and values as in this cache.

    One program walks all plans and widths.
    """
    config = dataclasses.replace(self.config, cache_dtype=cache_dtype)
    params, rows = walk.whole(made.params, self.params), np.concatenate(list(self.rows.values()))
    stream = walk.through(config, params, made.model.plan, walk.start(config, params, rows, self.flags.chunk))
    losses = np.split(walk.losses(config, params, stream, rows), np.cumsum([len(each) for each in self.rows.values()]))
    found: dict[str, dict[str, float]] = {}
    for (kind, name), each in zip(self.rows, losses, strict=False):
      found.setdefault(kind, {})[name] = math.exp(each.mean())
    return found

  def refitted(self, mixture: Mixture) -> Made:
    """The mixture's model, refitted on all rows; mixtures that differ only in cache dtype are refitted once."""
    mixture = mixture._replace(cache_dtype=None)
    if mixture not in self.made:
      rows = np.concatenate([text.calibration for text in self.texts])
      how = Refit(maps=True, mlp=True, value_dim=mixture.value_dim, local_epochs=self.flags.local_epochs)
      made = refit(self.model, self.params, mixture.plan, rows, how, chunk=self.flags.chunk, on_device=True)
      self.made[mixture] = Made(made.model, made.params)
    return self.made[mixture]

  def measure(self, mixture: Mixture) -> Json:
    """A mixture's perplexity relative to the dense model's, refitted on all rows; measured once, and stored."""
    name = f"{mixture.plan}; {mixture}"
    if name not in self.stored["measured"]:
      begun = time.perf_counter()
      made = self.refitted(mixture)
      self.stored["measured"][name] = {
        "mixture": str(mixture),
        "part": mixture.part(self.model.config),
        "shared_attention": write_plan(made.model.plan, made.model.config),
        "cache_dtype": mixture.cache_dtype,
        **self.times_dense(self.perplexities(made, mixture.cache_dtype)),
        "seconds": time.perf_counter() - begun,
      }
      found = self.stored["measured"][name]
      self.say(f"{mixture!s:<34} {100 * found['part']:5.1f} %  {show(found['times_dense'])}  {found['seconds']:.1f} s")
      self.save()
    return self.stored["measured"][name]

  def times_dense(self, found: dict[str, dict[str, float]]) -> Json:
    """Perplexities relative to the dense model's, and the mean logarithm of those on held-out rows."""
    times = {kind: {name: value / self.dense[kind][name] for name, value in of.items()} for kind, of in found.items()}
    return {"times_dense": times, "judged": float(np.mean([math.log(each) for each in times["judging"].values()]))}

  def settings(self) -> Json:
    """What was measured, and how."""
    flags = self.flags
    return {
      "model": flags.model.name,
      "device": jax.devices()[0].device_kind,
      "rows": {"fit": flags.rows, "judging": flags.judging, "test": flags.test},
      "length": flags.length,
      "local_epochs": flags.local_epochs,
      "dense": self.dense,
    }

  def save(self) -> None:
    """Writes the measurements."""
    self.flags.out.write_text(json.dumps(self.stored, indent=1) + "\n", encoding="utf-8")


def show(times: dict[str, dict[str, float]]) -> str:
  """Held-out and test results, on one line."""
  return "  ".join(f"{kind} {' / '.join(f'{each:.3f}' for each in of.values())}" for kind, of in times.items())


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Flags of all the board's scripts."""
  add = parser.add_argument
  add("--model", type=Path, required=True)
  add("--data", type=Path, required=True, help="folder with corpora/ and eval/")
  add("--plans", type=Path, required=True, help="results of a search, whose plans are taken")
  add("--out", type=Path, required=True, help="a JSON file; what it has is not measured again")
  add("--rows", type=int, default=176, help="rows of each text to fit to")
  add("--judging", type=int, default=16)
  add("--test", type=int, default=16)
  add("--search-rows", type=int, default=16, help="of the rows to fit to, how many candidates are judged after")
  add("--record", type=Path, help="a JSON file that keeps what candidates were judged at")
  add("--local-epochs", type=int, default=0, help="passes that train each group after the closed form")
  add("--length", type=int, default=512)
  add("--chunk", type=int, default=32)
