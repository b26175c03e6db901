"""Public functions as a v5e:2x4 would run them, compiled ahead of time: kernels run of each device's part."""

import functools
import importlib.util

import jax
import pytest

import sa_jax
from sa_jax import ModelConfig, SharingPlan, Transformer
from sa_jax.analysis import Text
from sa_jax.analysis.share import share
from sa_jax.evaluation import Scorer
from sa_jax.fit import Job, executables_of, topology_mesh, tpu_devices
from sa_jax.hlo import collectives
from sa_jax.mesh import MeshSizes
from sa_jax.programs import compiling
from sa_jax.sharding import abstract_params, make_mesh, mesh_of, param_shardings, traced_on
from tests import tiny

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'sa-jax[tpu]'"
)

# Of a vocabulary, and of so many key heads, that four and eight devices do not divide.
CONFIG = ModelConfig(
  vocab_size=509, embed_dim=128, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16, mlp_dim=128,
  dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip
TOKENS = tiny.tokens(8, 128, 509)
MESHES = {"tensor 8": {"tensor": 8}, "fsdp 8": {"fsdp": 8}, "2 x 4": {"fsdp": 2, "tensor": 4}}


@functools.cache
def model(plan, sizes, layout):
  """On a mesh of TPUs: the model, and its parameters' shapes."""
  made = Transformer(CONFIG, SharingPlan.parse(plan, 2))
  mesh = make_mesh(**dict(sizes), devices=tpu_devices("v5e:2x4"))
  like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return made, jax.tree.map(like, abstract_params(made, layout=layout), param_shardings(made, mesh, layout=layout))


def compiled(call):
  """The programs by their names, and in which of them is a kernel."""
  with compiling() as programs:
    call()
  return {each.name: "tpu_custom_call" in each.executable.as_text() for each in programs}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_perplexity(sizes):
  """Also of one row, which cannot be split."""
  opened = model("0:1", tuple(sizes.items()), "runs")
  for rows in (8, 1):
    assert compiled(lambda: sa_jax.perplexity(*opened, TOKENS[:rows], batch_size=rows)) == {"_log_likelihood": True}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_generate(sizes):
  opened = model("0:1", tuple(sizes.items()), "layers")
  assert compiled(lambda: sa_jax.generate(*opened, TOKENS, max_new_tokens=4)) == {"prefill": True, "decode": False}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_scoring(sizes):
  """Of rows for themselves, and of rows that begin alike."""
  opened = model("0:1", tuple(sizes.items()), "layers")
  requests = [(row[:40], row[40:42]) for row in TOKENS[:3]]
  requests += [([*TOKENS[4], number], [number, 5]) for number in range(4)]
  found = compiled(lambda: Scorer(*opened, batch_tokens=2048)(requests))
  assert set(found) == {"_hidden", "_read", "_hidden_after", "_scores"}
  assert found["_hidden"]
  assert found["_read"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_a_train_step(sizes):
  """Parameters that are split over `fsdp` are gathered, products that are split over `tensor` summed."""
  job = Job(CONFIG, SharingPlan.parse("0:1", 2), "train", "v5e:2x4", 8, 128, MeshSizes(**sizes))
  (step,) = executables_of(job, topology_mesh(job))
  text = step.as_text()
  assert "tpu_custom_call" in text
  kinds = {each.kind for each in collectives(text)}
  assert kinds >= ({"all-gather"} if "fsdp" in sizes else {"all-reduce"})


@pytest.mark.slow
def test_share():
  opened = model("dense", tuple(MESHES["2 x 4"].items()), "layers")
  found = compiled(lambda: share(*opened, [Text("text", TOKENS[:2], TOKENS[2:4])], 1, chunk=2))
  assert {name for name, kernel in found.items() if kernel} >= {"dense_layer", "head_sums", "_attend", "_gradient"}
  assert {"_begin", "row_losses", "_products", "_descend", "solve", "_log_likelihood"} <= set(found)


def test_ones_own_jit_needs_the_context():
  """Without it, one line says what is missing; in it, the model compiles."""
  made, params = model("0:1", (("fsdp", 8),), "runs")
  apply = jax.jit(lambda params, tokens: made.apply({"params": params}, tokens))
  with pytest.raises(sa_jax.UserError, match=r"'splash' needs sharding rules .*on_mesh"):
    apply.lower(params, TOKENS)
  with traced_on(mesh_of(params)):
    assert "tpu_custom_call" in apply.lower(params, TOKENS).as_text()
