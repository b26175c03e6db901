"""Two processes with four devices each are one process with eight: losses, parameters, checkpoints both ways.

With SA_JAX_GPUS=N in the environment, N even, devices are the first N GPUs, and the processes talk through NCCL.
"""

import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax.distributed import Hosts, start
from tests import host_devices
from tests.train.test_resume import ROOT, curve
from tests.train.tiny_run import SAVE_EVERY, STEPS, TEXT

pytestmark = pytest.mark.slow

STOP = 8
GPUS = int(os.environ.get("SA_JAX_GPUS", "0"))


def devices(rank, processes):
  """The environment in which a process has its part of the devices."""
  if not GPUS:
    return host_devices(8 // processes)
  mine = range(rank * GPUS // processes, (rank + 1) * GPUS // processes)
  return {
    "JAX_PLATFORMS": "cuda",
    "CUDA_VISIBLE_DEVICES": ",".join(map(str, mine)),
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
    # Runs share the GPUs.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # TF32 would not agree to five digits.
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
  }


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
  """Starts `tests.train.tiny_run` in one process or in two; what is compiled is kept for the next."""
  cache = str(tmp_path_factory.mktemp("compiled"))

  def begin(out, stop, processes):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    here = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "tests.train.tiny_run", str(out), "shard", str(stop)]
    commands = [command] if processes == 1 else [[*command, str(port), str(rank)] for rank in range(2)]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
      subprocess.Popen(each, env=os.environ | here | devices(rank, processes), **how)
      for rank, each in enumerate(commands)
    ]

  return begin


def end(running, code, says=""):
  told = [each.communicate(timeout=240)[0] for each in running]
  assert [each.returncode for each in running] == [code] * len(running), told
  assert says in told[0]


def test_two_processes_are_one(launch, tmp_path):
  """From the beginning until they stop, and from one process's last checkpoint but one to the end."""
  one, two = (tmp_path / name / "run" for name in ("one", "two"))
  for out in (one, two):
    out.parent.mkdir()
    (out.parent / "text.txt").write_text(TEXT)
  begun = [(launch(one, 0, 1), 0), (launch(two, STOP, 2), 143)]
  for running, code in begun:
    end(running, code)
  expected, params = np.asarray(curve(one)), sa_jax.from_pretrained(one / "model")[1]
  assert expected.shape == (STEPS, 3)
  shutil.rmtree(one / "checkpoints" / str(STEPS))
  shutil.rmtree(one / "model")
  begun = [(launch(two, 0, 1), STOP), (launch(one, 0, 2), STEPS - SAVE_EVERY)]
  for running, done in begun:
    end(running, 0, f"resuming after step {done}")
  for out in (one, two):
    np.testing.assert_allclose(np.asarray(curve(out)), expected, rtol=1e-5)
    again = sa_jax.from_pretrained(out / "model")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, params)


def test_half_of_the_flags():
  with pytest.raises(ValueError, match="`coordinator`, `processes` and `process` belong together"):
    start(Hosts(coordinator="127.0.0.1:1"))
