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
