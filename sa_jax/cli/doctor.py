"""``sa-jax doctor``: devices, processes, mesh, backends, storage and versions, before a run needs them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sa_jax.distributed import Hosts
from sa_jax.errors import UserError
from sa_jax.mesh import MeshSizes


@dataclasses.dataclass(frozen=True)
class Doctor:
  """Check devices, mesh, backends and storage before a run, on every host."""

  paths: tyro.conf.Positional[tuple[Path, ...]] = ()
  """Folders that the run reads and writes."""
  mesh: MeshSizes = MeshSizes()
  """A mesh to check, such as data=2,fsdp=4; remaining devices go to data."""
  hosts: Annotated[Hosts, tyro.conf.arg(name="process")] = dataclasses.field(default_factory=Hosts)
  """For runs on several hosts."""

  def run(self) -> None:
    """Prints the findings on the first process, and problems on every process."""
    from sa_jax.distributed import start

    start(self.hosts)
    import jax
    from rich.text import Text

    from sa_jax.cli.common import console
    from sa_jax.doctor import examine

    found = examine(self.mesh, self.paths)
    if jax.process_index() == 0:
      for each in found:
        if each.is_fault:  # reported once, at the end
          continue
        console.print(Text.assemble((each.about, "bold"), f": {each.found}"), soft_wrap=not console.is_terminal)
    if faults := [f"{each.about}: {each.found}" for each in found if each.is_fault]:
      raise UserError.of(f"process {jax.process_index()}", faults)
