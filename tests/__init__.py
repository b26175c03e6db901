"""The tests."""

import importlib.metadata

# Compiling is most of the time: programs are tiny, and need not be fast.
FAST_COMPILATION = " ".join(
  (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    # XLA dies of a flag that it does not know, and later versions do not know this one.
    *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []),
  )
)


def host_devices(count: int) -> dict[str, str]:
  """The environment in which a process has so many CPU devices, for processes that compute together."""
  return {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={count} {FAST_COMPILATION}",
    # Threads of XLA's pools, as many as cores by default: with fewer than devices, jaxlib 0.10 deadlocks when more
    # than 32 collectives are in flight.
    "NPROC": "16",
  }
