"""Choosing the remat policy of a run: the fastest whose compiled step fits in device memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from sa_jax.config import RematPolicy
from sa_jax.distributed import FOREVER, exchange
from sa_jax.errors import UserError
from sa_jax.train.batch import Batch
from sa_jax.train.step import Metrics, TrainState
from sa_jax.trees import Tree

Step = Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]

BY_TIME: tuple[RematPolicy, ...] = ("dots", "attention", "full")
"""Fastest first. ``none`` uses more memory than ``dots``, and was slower where both were measured
(`experiments/efficiency`)."""

_USABLE = 0.95
"""Usable fraction of the memory that JAX may allocate; the rest is for fragmentation, evaluation and data."""
_REFUSED = "refused"
"""The answer of a process whose compiler finds that a step does not fit."""


@dataclasses.dataclass(frozen=True)
class Remat:
  """The remat policy, and the step that uses it.

  Attributes:
    policy: one of `RematPolicy`.
    step: ``(state, frozen, batch)`` → the next state and metrics; compiled if the choice needed that.
    reason: why it was chosen, for messages; empty if requested by the user.
  """

  policy: RematPolicy
  step: Step
  reason: str = ""

  def __str__(self) -> str:
    return f"{self.policy} ({self.reason})" if self.reason else self.policy


def fastest(
  make: Callable[[RematPolicy], jax.stages.Wrapped],
  arguments: tuple[TrainState, Tree, Batch],
  mesh: Mesh,
  say: Callable[[str], None] = lambda text: None,
) -> Remat:
  """The first of `BY_TIME` that fits, compiled, or the one that needs the least memory if none does.

  Nothing is recomputed if devices do not report their memory.

  Args:
    make: returns the jitted step under a policy.
    arguments: the step's arguments: arrays, or shapes with shardings.
    mesh: the step's mesh.
    say: called with messages about compilation.

  Raises:
    UserError: if no step fits according to the compiler, or a process does not answer.
  """
  memory = device_memory(mesh)
  if memory is None:
    return Remat("none", make("none"), "these devices do not report their memory")
  gb = lambda number: f"{number / 1e9:,.3g} GB"
  twice = _twice(arguments)
  tried: dict[RematPolicy, tuple[int, jax.stages.Compiled]] = {}
  needs: dict[RematPolicy, str] = {}
  for policy in BY_TIME:
    say(f"compiling a step with remat {policy}, to see whether it fits in memory")
    compiled = _compiled(make(policy), arguments)
    needed = _of_all(None if compiled is None else step_bytes(compiled) - twice)
    needs[policy] = f"; {policy} would need {gb(needed) if needed else 'more than there is'}"
    if compiled is not None and needed is not None:
      tried[policy] = needed, compiled
      if needed <= _USABLE * memory:
        break
  if tried:
    # Slower policies are expected to need less memory, but for small steps they do not always.
    policy = min(reversed(tried), key=lambda policy: tried[policy][0])
    needed, compiled = tried[policy]
    doubt = "" if needed <= _USABLE * memory else ", so it may not fit"
    others = "".join(words for other, words in needs.items() if other != policy)
    return Remat(policy, compiled, f"of {gb(memory)}: {gb(needed)} needed{doubt}{others}")
  raise UserError(
    f"a step does not fit in the {gb(memory)} that JAX may use on a device, under any `remat`: use "
    "fewer rows (`batch_size`, `accumulate`), shorter ones, or more devices (`mesh`)"
  )


def step_bytes(compiled: jax.stages.Compiled) -> int:
  """Peak bytes of a compiled program per device, including arguments and results."""
  memory = compiled.memory_analysis()
  assert memory is not None, "devices that tell their memory tell a program's"
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return int(held + memory.temp_size_in_bytes)


def device_memory(mesh: Mesh) -> int | None:
  """Bytes that JAX may allocate on the smallest device of any process; None if one does not report it.

  On GPUs that is three quarters of the memory, unless ``XLA_PYTHON_CLIENT_MEM_FRACTION`` is set.

  Raises:
    UserError: if a process does not answer.
  """
  found = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
  return min(map(int, exchange("the devices' memory", str(min(found)), FOREVER))) or None


def _compiled(step: jax.stages.Wrapped, arguments: tuple[TrainState, Tree, Batch]) -> jax.stages.Compiled | None:
  """The compiled step for these arguments; None if the compiler finds that it does not fit."""
  try:
    return step.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None


def _twice(arguments: tuple[TrainState, Tree, Batch]) -> int:
  """Bytes per device that arrays passed more than once would be counted again."""
  leaves = jax.tree.leaves(arguments)
  of = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(map(of, leaves)) - sum(map(of, {id(leaf): leaf for leaf in leaves}.values()))


def _of_all(needed: int | None) -> int | None:
  """The maximum over all processes; None if the step does not fit on one of them.

  Waits indefinitely, because compile times differ between hosts, for example if one has the step in its cache.
  """
  answers = exchange("the bytes of a step", _REFUSED if needed is None else str(needed), FOREVER)
  return None if _REFUSED in answers else max(map(int, answers))
