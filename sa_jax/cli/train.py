"""``sa-jax train``: train from scratch, fine-tune, distil."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.distributed import Hosts
from sa_jax.errors import UserError
from sa_jax.train.config import TrainConfig, load_config


@dataclasses.dataclass(frozen=True)
class Train:
  """A parsed ``sa-jax train``."""

  config: TrainConfig
  hosts: Hosts

  def run(self) -> None:
    """Trains; exits with code 143, as on SIGTERM, if a signal stopped it early."""
    from sa_jax.cli.common import console, silence, tell
    from sa_jax.distributed import start

    start(self.hosts)
    silence()
    from sa_jax.train.loop import train

    outcome = train(self.config, say=lambda text: console.print(text), console=console)
    if outcome.interrupted:
      console.print(f"stopped after step {outcome.step}, which is saved; run the same command again to continue")
      sys.exit(143)
    tell("saved", outcome.model)


def with_file(arguments: Sequence[str]) -> tuple[Callable[..., Train], Sequence[str]]:
  """The subcommand and its arguments. If a config file comes first, its values become the flags' defaults."""
  name, file = (*arguments[:2], "", "")[:2]
  if name == "train" and file.endswith(".py"):
    return functools.partial(command, config=load_config(Path(file))), [name, *arguments[2:]]
  return command, arguments


def command(
  file: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="CONFIG.py")] = None,
  *,
  config: Annotated[TrainConfig, tyro.conf.arg(name="")],
  hosts: Annotated[Hosts, tyro.conf.arg(name="process")] = Hosts(),
) -> Train:
  """Train from scratch, fine-tune or distil a model with Shared Attention. Resumes a run that is in the folder.

  Args:
    file: A Python file whose variable config is a sa_jax.train.TrainConfig. It comes first; flags override it.
    config: The run.
    hosts: For runs on several hosts.
  """
  if file is not None:
    raise UserError(f"a config file must end in .py and come before all flags: sa-jax train CONFIG.py …, not {file}")
  return Train(config, hosts)
