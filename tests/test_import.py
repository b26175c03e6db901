"""`import sa_jax` is light, and its names are all there."""

import json
import subprocess
import sys

import sa_jax

HEAVY = (
  "torch",
  "transformers",
  "matplotlib",
  "gguf",
  "orbax.checkpoint",
  "jinja2",
  "safetensors",
  "tyro",
  "hypothesis",
  "grain",
  "tensorboardX",
)


def test_importing_loads_nothing_heavy():
  program = "import json, sys, sa_jax; print(json.dumps(sorted(sys.modules)))"
  done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
  loaded = set(json.loads(done.stdout))
  assert "sa_jax.nn.transformer" in loaded
  assert not loaded & set(HEAVY)


def test_public_names_exist():
  assert len(set(sa_jax.__all__)) == len(sa_jax.__all__)
  for module in (sa_jax, sa_jax.nn, sa_jax.ops):
    assert all(hasattr(module, name) for name in module.__all__)
