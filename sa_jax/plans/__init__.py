"""Plans of known models, with head maps, found by search: `get` returns the plan of a model.

Models are identified by the names and shapes of their parameters and, if parameters are given, by a hash of one tensor:
models of the same shape can have different attention patterns. The JSON files in this folder record how each plan was
found and its perplexity.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import resources
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats.hf_plan import read_plan
from sa_jax.nn import Transformer
from sa_jax.plan import SharingPlan
from sa_jax.programs import fetch
from sa_jax.sharding import abstract_params
from sa_jax.trees import Params


class _Entry(TypedDict):
  followers: int
  recovery: str
  times_dense: dict[str, float]
  shared_attention: dict[str, list[int] | list[list[int] | None]]


class _Model(TypedDict):
  model: str
  shapes: str
  final_norm: str
  made: str
  plans: list[_Entry]


class KnownPlan(NamedTuple):
  """A plan of a known model.

  Attributes:
    model: the model's name.
    plan: the plan with head maps; the model must be refitted under it.
    times_dense: for each text, the refitted model's perplexity divided by the dense model's.
    recovery: the method of refitting behind these numbers.
    made: how the plan and the numbers were obtained.
  """

  model: str
  plan: SharingPlan
  times_dense: dict[str, float]
  recovery: str
  made: str


def get(model: Transformer | ModelConfig, followers: int, params: Params | None = None) -> KnownPlan:
  """The plan of a known model with this many followers.

  Args:
    model: the dense model, or its config.
    followers: number of followers.
    params: in either layout, to tell the model from others of the same shape.

  Raises:
    UserError: if the model is unknown, or has no such plan.
  """
  config = model if isinstance(model, ModelConfig) else model.config
  shape = of_shapes(config)
  alike = [each for each in _known() if each["shapes"] == shape]
  found = [each for each in alike if params is None or each["final_norm"] == of_final_norm(params)]
  if not found:
    names = ", ".join(each["model"] for each in _known())
    other = f"; it has the shapes of {alike[0]['model']}, but different weights" if alike else ""
    raise UserError(f"no plans are known for this model, only for {names}{other}: search for one")
  plans = {each["followers"]: each for each in found[0]["plans"]}
  if followers not in plans:
    listed = ", ".join(map(str, plans))
    raise UserError(f"no plan with {followers} followers is known for {found[0]['model']}, only with {listed}")
  entry = plans[followers]
  plan = read_plan({"shared_attention": entry["shared_attention"]}, config.num_layers)
  return KnownPlan(found[0]["model"], plan, entry["times_dense"], entry["recovery"], found[0]["made"])


@functools.cache
def of_shapes(config: ModelConfig) -> str:
  """A hash of the names and shapes of the dense model's parameters, in the run layout."""
  leaves = jax.tree_util.tree_leaves_with_path(
    abstract_params(Transformer(config, SharingPlan.dense(config.num_layers)))
  )
  lines = sorted(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape}" for path, leaf in leaves)
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def of_final_norm(params: Params) -> str:
  """A hash of the final norm's scale in bfloat16, which is the same in all file formats of a model."""
  scale = np.asarray(fetch(jnp.asarray(params["final_norm"]["scale"]).astype(jnp.bfloat16)))
  return hashlib.sha256(scale.tobytes()).hexdigest()[:16]


@functools.cache
def _known() -> list[_Model]:
  files = (each for each in resources.files(__name__).iterdir() if each.name.endswith(".json"))
  return [json.loads(each.read_text(encoding="utf-8")) for each in sorted(files, key=lambda each: each.name)]
