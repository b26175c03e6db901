"""Whether kernels can run on the arrays' devices."""

import importlib.util
from typing import Any

import jax

triton: Any
try:
  from jax.experimental.pallas import triton
except ImportError:  # JAX 0.11 announces its removal: XLA then computes instead of kernels
  triton = None


def platform() -> str:
  """The arrays' platform: that of the mesh's devices, which are not the default ones when compiling ahead of time."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device  # type: ignore[attr-defined]
  if device is None:
    return jax.default_backend()
  return device if isinstance(device, str) else device.platform


def is_hopper() -> bool:
  """Whether this process runs on an H100 or H200, with Pallas Mosaic GPU available."""
  if platform() not in ("gpu", "cuda") or jax.default_backend() != "gpu":
    return False
  if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None:
    return False
  return str(getattr(jax.local_devices()[0], "compute_capability", "")) == "9.0"


def has_gpu_kernels(array: jax.Array) -> bool:
  """Whether a Triton kernel can take the array: JAX has Triton, the array `is_whole`, and it is on an NVIDIA GPU."""
  return triton is not None and platform() in ("gpu", "cuda") and is_whole(array)


def traced_mesh(array: jax.Array) -> jax.sharding.AbstractMesh:
  """The ambient mesh, or without one that of the array's sharding, which is known under `jax.jit` too."""
  ambient = jax.sharding.get_abstract_mesh()
  return jax.typeof(array).sharding.mesh if ambient.empty else ambient


def is_whole(array: jax.Array) -> bool:
  """Whether a kernel can take the array: it must not be sharded over several devices.

  XLA cannot partition a kernel: every device would gather all arrays and compute everything. Under `jax.shard_map`,
  where an array is one device's shard, a kernel can run; `sa_jax.nn` does that.
  """
  mesh = traced_mesh(array)
  return mesh.empty or mesh.size == 1 or len(mesh.manual_axes) == len(mesh.axis_names)
