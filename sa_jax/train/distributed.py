"""Several hosts as one machine."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from sa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Hosts:
  """How this process finds the others that train with it."""

  multihost: bool = False
  """Join the other processes: on a TPU pod, under SLURM, Open MPI or Kubernetes the environment says all."""
  coordinator: str | None = None
  """Elsewhere: ADDRESS:PORT of the first process."""
  processes: int | None = None
  """Elsewhere: how many processes there are."""
  process: int | None = None
  """Elsewhere: which of them this is, from 0."""


def start(hosts: Hosts) -> None:
  """Joins the other processes, if there are any; must come before anything asks for devices.

  Raises:
    UserError: if only some of the flags are given, or the others cannot be reached.
  """
  given = [value for value in (hosts.coordinator, hosts.processes, hosts.process) if value is not None]
  if given and len(given) < 3:
    raise UserError("`coordinator`, `processes` and `process` belong together; on a cluster `multihost` is enough")
  if not (given or hosts.multihost) or jax.distributed.is_initialized():
    return
  if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(hosts.coordinator, hosts.processes, hosts.process)
  except (RuntimeError, ValueError) as error:
    raise UserError(f"the other processes cannot be reached: {error}") from None


def wait_for_all(what: str) -> None:
  """Waits until every process has come here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def of_first_process(number: int) -> int:
  """The first process's number, on every process."""
  if jax.process_count() == 1:
    return number
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))
