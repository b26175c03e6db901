"""Measurements of sa_jax. Parameters are random, because only shapes matter."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa_jax import ops
from sa_jax.bench.measure import copy_bandwidth, device_name, matrix_rate, timed, training_rate
from sa_jax.bench.task import LONGEST_ANSWER, PROMPT, STEPS, Result, Task
from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.decode import Batcher, Engine, Prompts, Sampler, Serving, capacity_for
from sa_jax.errors import UserError
from sa_jax.nn import Runs, Transformer
from sa_jax.nn.split import Heads, query_axis
from sa_jax.nn.typed import apply
from sa_jax.plan import SharingPlan
from sa_jax.sharding import abstract_params, named_sharding, on_mesh, param_shardings
from sa_jax.train import (
  Batch,
  OptimizerConfig,
  make_optimizer,
  make_state,
  make_step,
  next_token,
  state_shardings,
)
from sa_jax.trees import Tree


def mesh_of(task: Task) -> Mesh | None:
  """The task's mesh over the first devices; None for one device.

  Raises:
    UserError: if there are fewer devices.
  """
  count = task.mesh.size
  return task.mesh.mesh(jax.devices()[:count]) if count > 1 else None


def random_tree(tree: Tree, shardings: Tree = None) -> Tree:
  """Normal values of standard deviation 0.02 in the shapes and dtypes of a tree, generated on each device."""
  leaves, structure = jax.tree.flatten(tree)
  places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
  fill = functools.cache(lambda place: jax.jit(_normal, static_argnames=("shape", "dtype"), out_shardings=place))
  values = [
    fill(place)(jax.random.key(number), leaf.shape, str(leaf.dtype))
    for number, (leaf, place) in enumerate(zip(leaves, places, strict=True))
  ]
  return jax.tree.unflatten(structure, values)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return (jax.random.normal(key, shape, jnp.float32) * 0.02).astype(dtype)


def decode(task: Task) -> Result:
  """One decode step: one call runs `STEPS` steps on device, after which the task's slots are filled."""
  config = task.config
  plan = SharingPlan.parse(task.plan, config.num_layers)
  model = Transformer(config, plan)
  mesh = mesh_of(task)
  shardings = None if mesh is None else param_shardings(model, mesh, layout="layers")
  ceiling = copy_bandwidth(mesh=mesh)
  params = random_tree(abstract_params(model, layout="layers"), shardings)
  start = task.tokens - STEPS
  engine = Engine(model, mesh)
  state = engine.empty(task.batch_size, task.length)
  # With equal rows, a mixture of experts would read only a few experts.
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, task.batch_size)

  def call() -> jax.Array:
    nonlocal state
    fresh = dataclasses.replace(
      state,
      tokens=jnp.asarray(tokens, jnp.int32),
      positions=jnp.full(task.batch_size, start, jnp.int32),
      remaining=jnp.full(task.batch_size, STEPS + 1, jnp.int32),
      done=jnp.zeros(task.batch_size, bool),
    )
    state, out = engine.decode(params, fresh, sampler=Sampler(), steps=STEPS, width=STEPS)
    return out.tokens

  timing = timed(call, task.repeats).scaled(1 / STEPS)
  # The average read: the cache grows from `start + 1` tokens.
  work = cost(config, plan, task.batch_size, task.tokens - (STEPS - 1) // 2).decode_bytes
  detail = f"cache {state.cache.nbytes / 1e9:.2f} GB{_split(task)}"
  return Result(task, *timing, work, ceiling, device_name(mesh), detail=detail)


def prefill(task: Task) -> Result:
  """The forward pass of a stack of layers, without embedding and head."""
  return _stack_of_layers(task, gradient=False)


def train(task: Task) -> Result:
  """The gradient of a stack of layers with respect to parameters and input."""
  return _stack_of_layers(task, gradient=True)


def step(task: Task) -> Result:
  """A whole train step: next-token loss, gradients, clipping and AdamW, on float32 parameters and moments."""
  config = dataclasses.replace(task.config, remat=task.remat, group_backward=task.group_backward, param_dtype="float32")
  plan = SharingPlan.parse(task.plan, config.num_layers)
  model = Transformer(config, plan)
  mesh = mesh_of(task)
  optimizer = make_optimizer(OptimizerConfig(), total_steps=1000)
  params = abstract_params(model)
  shardings = None if mesh is None else state_shardings(optimizer, params, param_shardings(model, mesh))
  ceiling = _matrix_rate(mesh)
  state = make_state(optimizer, random_tree(params, shardings and shardings.params), shardings, donate=True)
  tokens = jax.random.randint(jax.random.key(0), (task.batch_size, task.length), 0, config.vocab_size)
  batch = Batch(tokens, jnp.ones(tokens.shape, jnp.float32))
  if mesh is not None:
    batch = jax.device_put(batch, named_sharding(mesh, ("batch", "length")))
  compiled = make_step(next_token(model), optimizer, shardings=shardings).lower(state, None, batch).compile()

  def call() -> jax.Array:
    nonlocal state
    state, metrics = compiled(state, None, batch)
    return metrics.loss

  timing = timed(call, task.repeats)
  if not np.isfinite(float(call())):
    raise UserError("the loss is not finite, so the timing is meaningless")
  memory = compiled.memory_analysis()
  flops = 3 * cost(config, plan, task.batch_size, task.length).flops
  rate = training_rate(tokens.size, flops, timing.median, 1 if mesh is None else mesh.size)
  backend = _backend(config, task.length, mesh)
  temporaries = memory.temp_size_in_bytes if memory else None
  detail = f"{rate}, remat {task.remat}, {backend}{_split(task)}"
  return Result(task, *timing, flops, ceiling, device_name(mesh), temporaries, detail)


def _matrix_rate(mesh: Mesh | None = None) -> float:
  """The ceiling for compute-bound work; 0 on a CPU, where large products would take minutes."""
  return matrix_rate(mesh=mesh) if jax.default_backend() != "cpu" else 0.0


def _split(task: Task) -> str:
  """How the task is sharded, as text."""
  sizes = [f"{name} {size}" for name, size in task.mesh.axes().items() if size > 1]
  return f", {' × '.join(sizes)}" if sizes else ""


def _backend(config: ModelConfig, length: int, mesh: Mesh | None = None) -> str:
  """The attention backend for full rows of this length."""
  if config.attention_state != "query_key":
    return "weights"
  shape: Any = lambda heads: jax.ShapeDtypeStruct((1, length, heads, config.head_dim), config.dtype)
  q, k = shape(config.num_heads), shape(1)
  offset: Any = None
  if mesh is not None:
    with on_mesh(mesh):
      heads = Heads(config.num_heads, config.num_kv_heads)
      if query_axis(jax.sharding.get_abstract_mesh(), heads) is not None:
        offset = jax.ShapeDtypeStruct((), jnp.int32)
  return ops.choose_backend(config.attention, q, k, ops.Rows(offset=offset))


def _stack_of_layers(task: Task, gradient: bool) -> Result:
  config = dataclasses.replace(task.config, remat=task.remat, group_backward=task.group_backward)
  plan = SharingPlan.parse(task.plan, config.num_layers)
  ceiling = _matrix_rate()
  layers = Runs(config, plan)
  shape = (task.batch_size, task.length, config.embed_dim)
  abstract = jax.eval_shape(lambda: layers.init(jax.random.key(0), jnp.zeros(shape, config.dtype)))
  params = random_tree(nn.meta.unbox(abstract))
  x = jax.random.normal(jax.random.key(0), shape, config.dtype)

  read = lambda params, x: apply(layers, params["params"], Runs.__call__, x)

  def loss(params: Tree, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(read(params, x).astype(jnp.float32)))

  program = jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else read)
  compiled = program.lower(params, x).compile()
  memory = compiled.memory_analysis()
  timing = timed(lambda: compiled(params, x), task.repeats)
  temporaries = memory.temp_size_in_bytes if memory else None
  head = 2 * task.batch_size * task.length * config.vocab_size * config.embed_dim
  flops = (cost(config, plan, task.batch_size, task.length).flops - head) * (3 if gradient else 1)
  return Result(task, *timing, flops, ceiling, device_name(), temporaries, _backend(config, task.length))


def batching(task: Task) -> Result:
  """Requests with 64 prompt tokens and 16 to 512 new ones, longest first.

  ``detail`` compares with order of arrival, also with a paged cache of the same size, and with static batches, which
  wait for their longest row.
  """
  config = task.config
  plan = SharingPlan.parse(task.plan, config.num_layers)
  model = Transformer(config, plan)
  engine, params = Engine(model), random_tree(abstract_params(model, layout="layers"))
  rng = np.random.default_rng(0)
  prompts = rng.integers(3, config.vocab_size, (task.requests, PROMPT)).astype(np.int32)
  lengths = rng.integers(16, LONGEST_ANSWER + 1, task.requests)

  in_rows = Serving(slots=task.batch_size, capacity=task.length)
  cache_slots = task.batch_size * capacity_for(task.length)
  # On average, a request needs half the slots of the longest.
  in_pages = Serving(slots=2 * task.batch_size, capacity=task.length, cache_slots=cache_slots, together=4)

  def continuous(count: int, how: Serving) -> None:
    batcher = Batcher(model, params, how)
    requests = [
      batcher.submit(prompt, int(length)) for prompt, length in zip(prompts[:count], lengths[:count], strict=True)
    ]
    batcher.run()
    assert [len(request.tokens) for request in requests] == lengths[:count].tolist()

  def static(count: int) -> None:
    for start in range(0, count, task.batch_size):
      rows = slice(start, start + task.batch_size)
      batch = Prompts.of(list(prompts[rows]), PROMPT, lengths[rows].tolist())
      state = engine.prefill(params, batch, sampler=Sampler(), capacity=task.length)
      jax.block_until_ready(
        engine.decode(params, state, sampler=Sampler(), steps=LONGEST_ANSWER - 1, width=LONGEST_ANSWER - 1)
      )

  # Compile every size of admission, up to the largest.
  for how in (in_rows, in_pages):
    for power in range(how.slots.bit_length()):
      continuous(min(1 << power, task.requests), how)
  static(task.batch_size)
  longest_first = dataclasses.replace(in_rows, longest_first=True)
  ours, arrival, pages = (
    timed(functools.partial(continuous, task.requests, how), task.repeats, warmup=0)
    for how in (longest_first, in_rows, in_pages)
  )
  static_batches = timed(functools.partial(static, task.requests), task.repeats, warmup=0)
  tokens = int(lengths.sum())
  detail = (
    f"{static_batches.median / ours.median:.2f} × static batches ({tokens / static_batches.median:.0f} tokens/s); "
    f"in order of arrival {static_batches.median / arrival.median:.2f} ×, "
    f"with {in_pages.slots} rows in pages of as much cache {static_batches.median / pages.median:.2f} ×"
  )
  return Result(task, *ours, tokens, 0.0, device_name(), detail=detail)
