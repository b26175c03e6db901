"""Memory and best-case time of a program on a TPU slice, by ahead-of-time compilation on a machine without one.

`fit` compiles the real program with the real compiler (libtpu) for a named topology, and takes memory and collectives
from the result. Nothing runs: times are analytic.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa_jax.config import ModelConfig, RematPolicy
from sa_jax.costs import cost, expert_bytes
from sa_jax.decode import generate
from sa_jax.errors import UserError
from sa_jax.evaluation import Scorer, perplexity
from sa_jax.fields import Count, check_fields
from sa_jax.hlo import Collective, added, collectives
from sa_jax.mesh import MeshSizes
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.plan import SharingPlan
from sa_jax.programs import compiling
from sa_jax.sharding import abstract_params, cache_shardings, named_sharding, param_shardings, traced_on
from sa_jax.train import Batch, OptimizerConfig, make_optimizer, make_state, make_step, next_token, state_shardings
from sa_jax.trees import Tree

Kind = Literal["train", "prefill", "decode", "loop", "perplexity", "scoring", "calibration"]

# Environment that libtpu needs on a machine that is not a TPU host.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A program and its target slice.

  Attributes:
    config: the model. Parameters have its ``param_dtype``; a train step keeps Adam's moments in float32.
    plan: which layers share.
    kind: ``train`` (a step of AdamW), ``prefill`` (whole rows), ``decode`` (one token per row), or the programs of a
      public function: ``loop`` (`sa_jax.generate` of as many tokens as the cache has slots), ``perplexity``,
      ``scoring`` (a batch of ``sa-jax eval``) or ``calibration`` (a refit on a batch, as in ``sa-jax share``).
    topology: libtpu's name of a slice, for example ``v5e:16x16``, ``v6e:4x4``, ``v5p:4x4x4``.
    batch: total rows, ``B``.
    length: tokens per row; for decoding, cache slots.
    mesh: mesh sizes; if ``data`` is not given, it takes the remaining chips of the topology.
    remat: what a train step recomputes.
  """

  config: ModelConfig
  plan: SharingPlan
  kind: Kind
  topology: str
  batch: Count
  length: Count
  mesh: MeshSizes = MeshSizes()
  remat: RematPolicy = "full"

  def __post_init__(self) -> None:
    check_fields(self, "fit")
    wrong = []
    if self.kind != "train" and self.remat != "full":
      wrong.append(f"remat={self.remat} (only for train, not for {self.kind})")
    if self.length >= 2**31:
      wrong.append(f"length={self.length} (must be less than {2**31:,}: positions are int32)")
    if self.kind == "loop" and self.length < 2:
      wrong.append(f"length={self.length} (must be at least 2 for a loop: a prompt token and a new one)")
    sizes = mesh_on(self.topology, self.mesh)
    if self.batch % sizes.ways:
      wrong.append(f"batch={self.batch} (must be a multiple of {sizes.ways_spelt})")
    if self.length % sizes.sequence:
      wrong.append(f"length={self.length} (must be a multiple of sequence = {sizes.sequence})")
    if self.plan.num_layers != self.config.num_layers:
      wrong.append(f"a plan for {self.plan.num_layers} layers (the model has {self.config.num_layers})")
    if self.kind == "calibration" and not self.plan.followers:
      wrong.append("a dense plan (calibration needs followers to refit)")
    if wrong:
      raise UserError.of("fit", wrong)


def mesh_on(topology: str, mesh: MeshSizes) -> MeshSizes:
  """The sizes for the number of chips in a topology's name, such as ``v5e:2x4``, with ``data`` filled in."""
  counts = map(int, re.findall(r"\d+", topology.partition(":")[2]))
  return mesh.over(math.prod(counts) * mesh.slice)


@dataclasses.dataclass(frozen=True)
class Fit:
  """The result of compiling a `Job`, per device, which on most TPUs is a chip.

  Attributes:
    device: JAX's device kind.
    devices: number of devices in the topology.
    hbm_bytes: memory of a device.
    fits: whether the program compiles for it.
    problem: why not, in the compiler's words.
    peak_bytes: peak memory, including arguments; None if it does not fit.
    argument_bytes: parameters, state, cache and batch in that.
    collectives: data sent and received per execution, by kind.
    compute_seconds: analytic: the model's FLOPs at the peak matrix rate; a train step counts three forward passes, or
      four if products with parameters are recomputed.
    memory_seconds: analytic: the bytes that must be read and written, at the peak memory bandwidth.
    compile_seconds: compilation time on this machine.
  """

  device: str
  devices: int
  hbm_bytes: int
  fits: bool
  problem: str | None
  peak_bytes: int | None
  argument_bytes: int | None
  collectives: tuple[Collective, ...]
  compute_seconds: float
  memory_seconds: float
  compile_seconds: float

  @property
  def roofline_seconds(self) -> float:
    """A lower bound on execution time: the larger of the two, with free communication and full overlap."""
    return max(self.compute_seconds, self.memory_seconds)


def fit(job: Job) -> Fit:
  """Compiles a job in a separate process, with the environment that libtpu needs.

  Raises:
    UserError: if libtpu is not installed, or the job does not make sense (its topology, mesh or sizes).
    RuntimeError: if the compiler fails for another reason than running out of memory.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("fit compiles with libtpu, which is not installed: pip install 'sa-jax[tpu]'")
  with tempfile.TemporaryDirectory() as folder:
    question, answer = Path(folder, "job"), Path(folder, "fit")
    question.write_bytes(pickle.dumps(job))
    # -P: import nothing from the current folder.
    command = [sys.executable, "-P", "-m", "sa_jax.fit", str(question), str(answer)]
    done = subprocess.run(command, env=os.environ | _ENVIRONMENT, capture_output=True, text=True)
    if not answer.exists():
      last = "\n".join(done.stderr.strip().splitlines()[-20:])
      raise RuntimeError(f"the compiler's process ended with {done.returncode}:\n{last}")
    result = pickle.loads(answer.read_bytes())
  if isinstance(result, Exception):
    raise result
  return result


def compile_job(job: Job) -> Fit:
  """Compiles a job in this process, whose environment must be as `fit` makes it; arguments and errors as there."""
  from jax.experimental.pallas import tpu as pltpu

  mesh = topology_mesh(job)
  cores = mesh.devices.flat[0].num_cores
  with traced_on(mesh):
    info = pltpu.get_tpu_info()
  start = time.perf_counter()
  problem: str | None = None
  executables: list[jax.stages.Compiled] = []
  try:
    executables = executables_of(job, mesh)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise RuntimeError(str(error)) from error
    problem = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
  memory = [found for each in executables if (found := each.memory_analysis()) is not None]
  compute, moved = _roofline(job, mesh)
  return Fit(
    device=mesh.devices.flat[0].device_kind,
    devices=mesh.devices.size,
    hbm_bytes=info.hbm_capacity_bytes * cores,
    fits=problem is None,
    problem=problem,
    peak_bytes=max((each.peak_memory_in_bytes for each in memory), default=None),
    argument_bytes=max((each.argument_size_in_bytes for each in memory), default=None),
    collectives=added([collectives(each.as_text() or "") for each in executables]),
    compute_seconds=compute / (info.bf16_ops_per_second * cores),
    memory_seconds=moved / (info.mem_bw_bytes_per_second * cores),
    compile_seconds=time.perf_counter() - start,
  )


def executables_of(job: Job, mesh: Mesh) -> list[jax.stages.Compiled]:
  """The programs of a job, each compiled once for the mesh; several if a public function runs several.

  Raises:
    UserError: if the parameters do not fit the mesh.
    jax.errors.JaxRuntimeError: if a program does not fit its devices.
  """
  if job.kind not in _CALLS:
    step, arguments = program(job, mesh)
    with traced_on(mesh):
      return [step.lower(*arguments).compile()]
  with compiling() as programs:
    _CALLS[job.kind](job, mesh)
  # The prefill, which a loop runs once, is a separate kind.
  return [each.executable for each in programs if job.kind != "loop" or each.name == "decode"]


def topology_mesh(job: Job) -> Mesh:
  """The job's mesh over the devices of its topology.

  Raises:
    UserError: if libtpu does not know the topology, or its number of devices does not match the mesh.
  """
  devices = tpu_devices(job.topology, job.mesh.slice)
  try:
    return job.mesh.mesh(devices)
  except UserError as error:
    raise UserError(f"{job.topology}: {error}") from None


def tpu_devices(topology: str, slices: int = 1) -> Sequence[jax.Device]:
  """The devices of TPU slices that are not attached, for a mesh to compile for.

  Requires a separate process, like the one `fit` starts, or one that has not used libtpu yet.

  Raises:
    UserError: if libtpu does not know the topology.
  """
  from jax.experimental import topologies

  os.environ.update({**_ENVIRONMENT, **os.environ})
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
  except Exception as error:
    raise UserError(
      f"libtpu does not know the topology {topology!r} ({str(error).splitlines()[0]}); "
      "examples: v5e:2x4, v5e:16x16, v6e:4x4, v5p:2x2x1, v5p:4x4x4"
    ) from error


def program(job: Job, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Tree, ...]]:
  """A job of training, prefill or decoding as a jitted function and the shapes of its arguments, with their shardings.

  Raises:
    UserError: if the parameters do not fit the mesh.
  """
  make = {"train": _train, "prefill": _prefill, "decode": _decode}[job.kind]
  return make(job, mesh)


def _train(job: Job, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Tree, ...]]:
  model = Transformer(dataclasses.replace(job.config, remat=job.remat), job.plan)
  optimizer = make_optimizer(OptimizerConfig(), total_steps=1000)
  params = abstract_params(model)
  shardings = state_shardings(optimizer, params, param_shardings(model, mesh))
  state = _sharded(jax.eval_shape(functools.partial(make_state, optimizer), params), shardings)
  tokens = _tokens(job, mesh, "batch", "length")
  weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32, sharding=tokens.sharding)
  return make_step(next_token(model), optimizer, shardings=shardings), (state, None, Batch(tokens, weights))


def _prefill(job: Job, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Tree, ...]]:
  model = Transformer(job.config, job.plan)
  prefill = lambda params, tokens, lengths: apply(model, params, Transformer.prefill, tokens, lengths)
  logits = named_sharding(mesh, ("batch", "vocab"), shape=(job.batch, job.config.vocab_size))
  arguments = (_layer_params(model, mesh), _tokens(job, mesh, "batch", "length"), _tokens(job, mesh, "batch"))
  return jax.jit(prefill, out_shardings=(logits, cache_shardings(model, mesh))), arguments


def _decode(job: Job, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Tree, ...]]:
  model = Transformer(job.config, job.plan)

  def step(params: Tree, cache: Cache, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Cache]:
    logits, cache = apply(model, params, Transformer.step, tokens, cache, positions)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

  cache = jax.eval_shape(lambda: Cache.empty(job.config, job.plan, job.batch, job.length))
  shardings = cache_shardings(model, mesh)
  rows = _tokens(job, mesh, "batch")
  arguments = (_layer_params(model, mesh), _sharded(cache, shardings), rows, rows)
  return jax.jit(step, donate_argnums=1, out_shardings=(rows.sharding, shardings)), arguments


def _rows(job: Job, length: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, job.config.vocab_size, (job.batch, length), dtype=np.int32)


def _loop(job: Job, mesh: Mesh) -> None:
  model = Transformer(job.config, job.plan)
  generate(model, _layer_params(model, mesh), _rows(job, 1), max_new_tokens=job.length - 1, cache_length=job.length)


def _perplexity(job: Job, mesh: Mesh) -> None:
  model = Transformer(job.config, job.plan)
  params = _sharded(abstract_params(model), param_shardings(model, mesh))
  perplexity(model, params, _rows(job, job.length), batch_size=job.batch)


def _scoring(job: Job, mesh: Mesh) -> None:
  model = Transformer(job.config, job.plan)
  scorer = Scorer(model, _layer_params(model, mesh), batch_tokens=job.batch * job.length)
  scorer([(row[:-1], row[-1:]) for row in _rows(job, job.length + 1)])


def _calibration(job: Job, mesh: Mesh) -> None:
  from sa_jax.analysis.refit import refit

  model = Transformer(job.config, SharingPlan.dense(job.config.num_layers))
  refit(model, _layer_params(model, mesh), job.plan, _rows(job, job.length), chunk=job.batch, on_device=True)


_CALLS: dict[Kind, Callable[[Job, Mesh], None]] = {
  "loop": _loop,
  "perplexity": _perplexity,
  "scoring": _scoring,
  "calibration": _calibration,
}
"""Kinds that run a public function with shapes instead of parameters."""


def _layer_params(model: Transformer, mesh: Mesh) -> Tree:
  return _sharded(abstract_params(model, layout="layers"), param_shardings(model, mesh, layout="layers"))


def _sharded(shapes: Tree, shardings: Tree) -> Tree:
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _tokens(job: Job, mesh: Mesh, *axes: str) -> jax.ShapeDtypeStruct:
  shape = (job.batch, job.length)[: len(axes)]
  return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=named_sharding(mesh, axes))


def _roofline(job: Job, mesh: Mesh) -> tuple[float, float]:
  """FLOPs and bytes of one execution on one device, from `sa_jax.cost`, without padding and re-reads."""
  counted = cost(job.config, job.plan, job.batch, job.length)
  devices, tensor = mesh_on(job.topology, job.mesh).size, job.mesh.tensor
  # A device reads the parameters it multiplies with: its `tensor` shard, gathered over `fsdp`, and its own experts.
  elsewhere = functools.partial(expert_bytes, job.config, 1 - 1 / job.mesh.expert)
  params = (counted.param_bytes - elsewhere()) / tensor
  cache = counted.kv_cache_bytes / devices
  if job.kind in ("decode", "loop"):
    read = (counted.decode_bytes - counted.kv_cache_bytes - elsewhere(tokens=job.batch)) / tensor
    return counted.decode_flops / devices, read + cache
  if job.kind == "prefill":
    skipped = 2 * job.config.vocab_size * job.config.embed_dim * job.batch * (job.length - 1)
    return (counted.flops - skipped) / devices, params + cache
  if job.kind in ("perplexity", "scoring"):
    return counted.flops / devices, params
  if job.kind == "calibration":  # the dense model as well as the shared one, without their heads
    head = 2 * job.config.vocab_size * job.config.embed_dim * job.batch * job.length
    dense = cost(job.config, None, job.batch, job.length)
    read = (counted.param_bytes + dense.param_bytes - 2 * elsewhere()) / tensor
    return (counted.flops + dense.flops - 2 * head) / devices, read
  arguments = program(job, mesh)[1]
  # Forward, perhaps twice, and twice as much backward; the update reads and writes parameters and state once more.
  passes = 3 if job.remat in ("none", "dots") else 4
  held = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(arguments[0]))
  return passes * counted.flops / devices, 3 * params + 2 * held


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
  return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _main(question: str, answer: str) -> None:
  """The process started by `fit`: a job in, its `Fit` or its error out."""
  result: Fit | Exception
  try:
    result = compile_job(pickle.loads(Path(question).read_bytes()))
  except (ValueError, RuntimeError, MemoryError) as error:
    result = type(error)(str(error))
  Path(answer).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
  # Imported under its own name, so that pickles made here load elsewhere.
  from sa_jax.fit import _main as main

  main(*sys.argv[1:])
