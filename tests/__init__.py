"""The tests."""

# Compiling is most of the time: programs are tiny, and need not be fast.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
