"""The command line: one module a subcommand, thin over the library.

A subcommand is a dataclass whose fields are its flags and whose ``run`` does the work.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol


class Command(Protocol):
  """A parsed subcommand."""

  def run(self) -> None:
    """Does the work; raises UserError for a user's mistake."""
    ...


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs ``sa-jax``; returns its exit code: 0 done, 2 bad usage or bad input."""
  import tyro

  from sa_jax.cli import (
    align,
    analyze,
    bench,
    convert,
    cost,
    demo,
    eval,
    export,
    fit,
    generate,
    perplexity,
    refit,
    search,
    share,
    train,
  )

  given = sys.argv[1:] if arguments is None else arguments
  commands: dict[str, Callable[..., Command]] = {
    "demo": demo.Demo,
    "convert": convert.Convert,
    "export": export.Export,
    "generate": generate.Generate,
    "perplexity": perplexity.PerplexityOf,
    "eval": eval.Eval,
    "cost": cost.CostOf,
    "analyze": analyze.Analyze,
    "search": search.SearchPlan,
    "align": align.Align,
    "refit": refit.RefitModel,
    "share": share.Share,
    "fit": fit.FitOf,
    "bench": bench.Bench,
  }
  try:
    logging.basicConfig(format="%(name)s: %(message)s", level=os.environ.get("SA_JAX_LOG", "WARNING").upper())
    commands["train"], given = train.command(given)
    command: Command = tyro.extras.subcommand_cli_from_dict(
      commands,
      prog="sa-jax",
      description="Shared Attention for JAX.",
      args=given,
      config=(tyro.conf.OmitArgPrefixes,),
    )
    command.run()
  except (ValueError, OSError) as error:
    if os.environ.get("SA_JAX_DEBUG"):
      raise
    print(f"sa-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  return 0
