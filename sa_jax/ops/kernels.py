"""Whether kernels may run where the arrays are."""

import importlib.util
from typing import Any

import jax

triton: Any
try:
  from jax.experimental.pallas import triton
except ImportError:  # JAX 0.11 announces its removal: without it XLA computes what kernels would
  triton = None


def platform() -> str:
  """Where the arrays are: on the mesh's devices, which are not the default ones when compiling ahead of time."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device  # type: ignore[attr-defined]
  if device is None:
    return jax.default_backend()
  return device if isinstance(device, str) else device.platform


def is_hopper() -> bool:
  """Whether this process has an H100 or H200 for arrays, and Pallas Mosaic GPU for kernels."""
  if platform() not in ("gpu", "cuda") or jax.default_backend() != "gpu":
    return False
  if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None:
    return False
  return str(getattr(jax.local_devices()[0], "compute_capability", "")) == "9.0"


def has_gpu_kernels(array: jax.Array) -> bool:
  """Whether a Triton kernel may take the array: JAX has Triton, the array `is_whole`, and it is on an NVIDIA GPU."""
  return triton is not None and platform() in ("gpu", "cuda") and is_whole(array)


def is_whole(array: jax.Array) -> bool:
  """Whether a kernel may take the array: not while it is spread over several devices.

  XLA cannot split a kernel: every device would gather all of its arrays and compute all of it. Under `jax.shard_map`,
  where an array is a device's own part, it may run; `sa_jax.nn` calls kernels so.
  """
  ambient = jax.sharding.get_abstract_mesh()
  mesh = jax.typeof(array).sharding.mesh if ambient.empty else ambient
  return mesh.empty or mesh.size == 1 or len(mesh.manual_axes) == len(mesh.axis_names)
