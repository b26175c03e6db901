"""Benchmarks: decode, prefill, training and continuous batching, ours and other libraries', on any device.

A measurement is a `Task`; `run_task` runs it in a separate process, so that measurements do not share memory.
"""

from sa_jax.bench.measure import Timing, copy_bandwidth, device_name, matrix_rate, timed
from sa_jax.bench.task import Result, Task, run_task

__all__ = ["Result", "Task", "Timing", "copy_bandwidth", "device_name", "matrix_rate", "run_task", "timed"]
