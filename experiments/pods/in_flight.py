"""Do programs that communicate wait for each other forever when many are in flight? Two CPU processes of four devices.

python experiments/pods/in_flight.py --programs 200 [--threads 16]
"""

import argparse
import os
import socket
import subprocess
import sys
import time

PROCESS = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.NamedSharding(mesh, P("data"))
x = jax.make_array_from_callback((64,), sharding, lambda index: np.ones(64, np.float32)[index])
total = jax.jit(lambda x: x.sum())
for _ in range(20):
  found = [total(x) for _ in range(int(sys.argv[3]))]
  assert all(float(each) == 64 for each in found)
"""


def main() -> None:
  """Prints whether both processes ended."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--programs", type=int, default=200, help="in flight at once")
  parser.add_argument("--threads", type=int, help="of XLA's pools (NPROC); one a core by default")
  parser.add_argument("--patience", type=float, default=60.0, help="seconds after which they hang")
  args = parser.parse_args()
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  env |= {"NPROC": str(args.threads)} if args.threads else {}
  began = time.perf_counter()
  both = [
    subprocess.Popen([sys.executable, "-c", PROCESS, address, str(rank), str(args.programs)], env=env)
    for rank in range(2)
  ]
  try:
    codes = [each.wait(max(0.0, args.patience - time.perf_counter() + began)) for each in both]
    print(f"ended with {codes} after {time.perf_counter() - began:.0f} s")
  except subprocess.TimeoutExpired:
    for each in both:
      each.kill()
    print(f"hang: not done after {args.patience:.0f} s")


if __name__ == "__main__":
  main()
