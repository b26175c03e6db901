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
  "optax",
  "orbax.checkpoint",
  "jax.experimental.pallas.ops.tpu.splash_attention",
  "jinja2",
  "safetensors",
  "tyro",
  "hypothesis",
  "grain",
  "tensorboardX",
  "lm_eval",
  "datasets",
  "wandb",
  "sa_jax.train",
  "sa_jax.analysis",
)


def test_importing_loads_nothing_heavy():
  program = "import json, sys, sa_jax; print(json.dumps(sorted(sys.modules)))"
  done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
  loaded = set(json.loads(done.stdout))
  assert "sa_jax.nn.transformer" in loaded
  assert not loaded & set(HEAVY)


def test_training_and_analysis_are_there_from_the_start():
  program = """if True:
    import sys, sa_jax
    assert {"analysis", "train"} <= set(dir(sa_jax))
    assert "sa_jax.train" not in sys.modules
    print(sa_jax.train.make_step.__name__, sa_jax.analysis.look.__name__)
    try:
      sa_jax.trian
    except AttributeError as error:
      print(error)
  """
  done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
  assert done.stdout == "make_step look\nmodule 'sa_jax' has no attribute 'trian'\n"


def test_without_pallas_triton_there_are_no_gpu_kernels_and_everything_else():
  program = """if True:
    import sys
    sys.modules["jax.experimental.pallas.triton"] = None
    import jax, sa_jax
    from sa_jax.ops import kernels
    kernels.platform = lambda: "gpu"
    q = jax.ShapeDtypeStruct((1, 2048, 2, 64), "bfloat16")
    rows = sa_jax.ops.Rows(segments=jax.ShapeDtypeStruct((1, 2048), "int32"))
    print(kernels.has_gpu_kernels(q), sa_jax.ops.choose_backend("auto", q, q, rows))
    sa_jax.ops.choose_backend("flash", q, q)
  """
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
  assert done.stdout.split() == ["False", "blockwise"]
  assert "it needs Pallas Triton, which this version of JAX does not have" in done.stderr


def test_public_names_exist():
  assert len(set(sa_jax.__all__)) == len(sa_jax.__all__)
  for module in (sa_jax, sa_jax.nn, sa_jax.ops):
    assert all(hasattr(module, name) for name in module.__all__)
