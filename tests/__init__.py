"""The tests."""

# Compiling is most of the time: programs are tiny, and need not be fast.
FAST_COMPILATION = " ".join(
  (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
  )
)
