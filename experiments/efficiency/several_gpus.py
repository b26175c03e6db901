"""Communication of sequence parallelism: a dense stack of layers and one under a plan, from the compiled programs.

    python experiments/efficiency/several_gpus.py --json several/sequence-8.json

Layers with Llama-3-8B's shapes, one row of 32,768 tokens, sharded over `sequence` 8: compiled for 8 virtual CPU devices
from abstract arrays, so nothing runs. Per-layer numbers are differences between 8 and 4 layers. Gradients of
parameters, which are summed over `sequence` as over `data`, are left out: only the input's gradient is taken. The CPU
compiler turns bfloat16 into float32, so programs are compiled in float32, and bytes are halved.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.progress import track

from sa_jax import ModelConfig, SharingPlan, ops
from sa_jax.cli.common import show_table, write_json
from sa_jax.display import quantity
from sa_jax.hlo import Collective, collectives
from sa_jax.nn import Runs
from sa_jax.sharding import make_mesh, named_sharding, on_mesh, tree_shardings

PLANS = {"dense": ("dense", "dense"), "0:1-3,4:5-7": ("0:1-3", "0:1-3,4:5-7")}
"""The compared plans: for 4 layers, and for 8."""


@dataclasses.dataclass(frozen=True)
class Sent:
  """Communication of one device, in bfloat16 bytes.

  Attributes:
    forward: all-to-all or all-gather bytes in the forward pass.
    again: the same in the backward pass, which recomputes each layer and sends gradients back.
    reduced: bytes summed over devices in the backward pass.
  """

  forward: int
  again: int
  reduced: int

  def __sub__(self, other: Sent) -> Sent:
    return Sent(self.forward - other.forward, self.again - other.again, self.reduced - other.reduced)

  def over(self, parts: int) -> Sent:
    """An equal fraction of it."""
    values = dataclasses.astuple(self)
    assert all(value % parts == 0 for value in values), (values, parts)
    return Sent(*(value // parts for value in values))


def compiled(plan: str, layers: int, length: int, devices: int, gradient: bool) -> tuple[Collective, ...]:
  """The collectives of a stack of layers, or of the gradient with respect to its input."""
  preset = ModelConfig.preset("llama-3-8b", num_layers=layers, dtype="float32", param_dtype="float32")
  stack = Runs(dataclasses.replace(preset, attention="blockwise", remat="full"), SharingPlan.parse(plan, layers))
  mesh = make_mesh(sequence=devices, devices=jax.devices()[:devices])
  x = jax.ShapeDtypeStruct(
    (1, length, preset.embed_dim), jnp.float32, sharding=named_sharding(mesh, ("batch", "length", None))
  )
  boxed = jax.eval_shape(lambda x: stack.init(jax.random.key(0), x, ops.Rows()), x)
  like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  params = jax.tree.map(like, nn.unbox(boxed), tree_shardings(boxed, mesh))

  def loss(x: jax.Array, params: Any) -> jax.Array:
    return jnp.square(stack.apply(params, x, ops.Rows())).sum()

  program = jax.grad(loss) if gradient else lambda x, params: stack.apply(params, x, ops.Rows())
  with on_mesh(mesh):
    return collectives(jax.jit(program).lower(x, params).compile().as_text())


def sent(plan: str, layers: int, length: int, devices: int) -> Sent:
  """Bytes that a stack of layers sends, forward and backward."""
  forward, both = (
    {found.kind: found.bytes // 2 for found in compiled(plan, layers, length, devices, gradient)}
    for gradient in (False, True)
  )
  moving, adding = {"all-to-all", "all-gather"}, {"all-reduce", "reduce-scatter"}
  if set(forward) - moving or set(both) - moving - adding:
    raise ValueError(f"other collectives than are counted here: {forward}, {both}")
  count = lambda found, kinds: sum(found.get(kind, 0) for kind in kinds)
  return Sent(count(forward, moving), count(both, moving) - count(forward, moving), count(both, adding))


def main() -> None:
  """Compiles both, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--length", type=int, default=32768, help="tokens of the row")
  parser.add_argument("--sequence", type=int, default=8, help="devices")
  parser.add_argument("--json", type=Path, default=None)
  arguments = parser.parse_args()
  stacks = {
    (name, layers): sent(plan, layers, arguments.length, arguments.sequence)
    for name, layers, plan in track(
      [(name, layers, plan) for name, pair in PLANS.items() for layers, plan in zip((4, 8), pair, strict=True)],
      "compiling",
    )
  }
  dense, shared = (stacks[name, 8] - stacks[name, 4] for name in PLANS)
  anchor = dense.over(4)
  rows = {"an anchor": anchor, "a follower": (shared - anchor).over(3)}
  rows |= {f"8 layers, {name}": stacks[name, 8] for name in PLANS}
  show_table(
    f"Llama-3-8B's shapes, 1 × {arguments.length} tokens over sequence {arguments.sequence}, bfloat16",
    ["", "sent forward", "sent backward", "added up backward"],
    [[name, *(quantity(value, "B") for value in dataclasses.astuple(row))] for name, row in rows.items()],
  )
  write_json(arguments.json, {"length": arguments.length, "sequence": arguments.sequence, "rows": rows})


if __name__ == "__main__":
  main()
