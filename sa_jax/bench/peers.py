"""The alternative, if installed: Hugging Face transformers on PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sa_jax.bench.measure import Timing, timed, training_rate
from sa_jax.bench.task import STEPS, Result, Task
from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.errors import UserError
from sa_jax.formats import hf_config
from sa_jax.trees import Tree

_DEVICE = "cuda"


def _build(task: Task, head: bool, dtype: str = "bfloat16") -> tuple[Any, ModelConfig]:
  """A randomly initialised model on the GPU, in the preset's shapes."""
  try:
    import torch
    import transformers
  except ImportError:
    raise UserError("peers need torch and transformers: pip install torch transformers") from None
  import dataclasses

  preset = ModelConfig.preset(task.model)
  config = dataclasses.replace(preset, num_layers=task.layers or preset.num_layers)
  if not head:
    config = dataclasses.replace(config, vocab_size=32)
  values = hf_config.write(config) | {"bos_token_id": 0, "eos_token_id": 1}
  made = transformers.CONFIG_MAPPING[config.family](**values, attn_implementation="sdpa")  # type: ignore[call-arg]
  torch.set_default_dtype(getattr(torch, dtype))
  with torch.device(_DEVICE):
    model = (transformers.AutoModelForCausalLM if head else transformers.AutoModel).from_config(made)
  return model, config


def _timed(call: Callable[[], Any], repeats: int) -> Timing:
  import torch

  return timed(call, repeats, warmup=3, wait=lambda _: torch.cuda.synchronize())


def decode(task: Task) -> Result:
  """Greedy decode steps against a static cache of ``length`` slots, the forward pass compiled with CUDA graphs."""
  import torch
  import transformers

  model, config = _build(task, head=True)
  model.eval()
  cache = transformers.StaticCache(config=model.config, max_cache_len=task.length)

  # renamed in transformers 5.24
  name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

  def step(token: Any, position: Any) -> Tree:
    out = model(token, position_ids=position, use_cache=True, **{name: cache})
    return out.logits[:, -1:].argmax(-1)

  with torch.no_grad():
    prompt = torch.randint(2, config.vocab_size, (task.batch_size, 16), device=_DEVICE)
    token = model(prompt, use_cache=True, **{name: cache}).logits[:, -1:].argmax(-1)
    if task.who == "hf-compiled":
      step = torch.compile(step, mode="reduce-overhead", dynamic=False)
    positions = [torch.full((task.batch_size, 1), 16 + index, device=_DEVICE) for index in range(STEPS)]

    def call() -> None:
      nonlocal token
      cache.layers  # noqa: B018 (the cache is the compiled function's own)
      for position in positions:
        token = step(token, position).clone()

    # Attention reads all slots of a static cache at any position, so a short run is representative.
    calls = min(task.repeats, (task.length - 16) // STEPS - 4)
    timing = _timed(call, calls).scaled(1 / STEPS)
  work = cost(config, None, task.batch_size, task.tokens).decode_bytes
  return Result(
    task, *timing, work, 0.0, torch.cuda.get_device_name(), detail=f"transformers {transformers.__version__}"
  )


def prefill(task: Task) -> Result:
  """The forward pass of a stack of layers, SDPA; compiled."""
  import torch

  model, config = _build(task, head=False)
  model.eval()
  if task.who == "hf-compiled":
    model.compile()
  x = torch.randn(task.batch_size, task.length, config.embed_dim, device=_DEVICE)
  with torch.no_grad():
    timing = _timed(lambda: model(inputs_embeds=x, use_cache=False).last_hidden_state, task.repeats)
  return _of_stack(task, config, timing, passes=1)


def train(task: Task) -> Result:
  """The gradient of a stack of layers, SDPA, gradient checkpointing; compiled."""
  import torch

  model, config = _build(task, head=False)
  model.train()
  model.gradient_checkpointing_enable()
  if task.who == "hf-compiled":
    model.compile()
  x = torch.randn(task.batch_size, task.length, config.embed_dim, device=_DEVICE, requires_grad=True)

  def call() -> None:
    model.zero_grad(set_to_none=True)
    x.grad = None
    out = model(inputs_embeds=x, use_cache=False).last_hidden_state
    out.float().square().mean().backward()

  return _of_stack(task, config, _timed(call, task.repeats), passes=3)


def _of_stack(task: Task, config: ModelConfig, timing: Timing, passes: int) -> Result:
  """The result for a stack of layers: a gradient counts as three passes, one of them the forward pass."""
  import torch
  import transformers

  head = 2 * task.batch_size * task.length * config.vocab_size * config.embed_dim
  flops = (cost(config, None, task.batch_size, task.length).flops - head) * passes
  peak = torch.cuda.max_memory_allocated()
  detail = f"transformers {transformers.__version__}, peak {peak / 1e9:.1f} GB"
  return Result(task, *timing, flops, 0.0, torch.cuda.get_device_name(), detail=detail)


def step(task: Task) -> Result:
  """A whole train step: SDPA, autocast to bfloat16 over float32 parameters, clipping, fused AdamW; compiled."""
  import torch
  import transformers

  model, config = _build(task, head=True, dtype="float32")
  model.train()
  if task.remat != "none":
    model.gradient_checkpointing_enable()
  if task.who == "hf-compiled":
    model.compile()
  optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  tokens = torch.randint(0, config.vocab_size, (task.batch_size, task.length), device=_DEVICE)

  def call() -> None:
    with torch.autocast("cuda", torch.bfloat16):
      loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  timing = _timed(call, task.repeats)
  flops = 3 * cost(config, None, task.batch_size, task.length).flops
  rate = training_rate(task.batch_size * task.length, flops, timing.median)
  peak = torch.cuda.max_memory_allocated()
  detail = f"{rate}, transformers {transformers.__version__}, torch {torch.__version__}, peak {peak / 1e9:.1f} GB"
  return Result(task, *timing, flops, 0.0, torch.cuda.get_device_name(), detail=detail)
