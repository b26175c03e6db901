"""A model's files under a plan: the use of each tensor, and the lazy parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats import hf_config
from sa_jax.formats.lazy import lazy_tree
from sa_jax.formats.source import Source, model_of, open_source
from sa_jax.formats.table import Account, entries, head_keys
from sa_jax.nn.transformer import check_plan
from sa_jax.plan import PlanLike, SharingPlan, as_plan


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model's files under a plan.

  Attributes:
    source: the files.
    config: the model, in the requested dtype.
    plan: which layers share.
    account: the use of every stored tensor.
  """

  source: Source
  config: ModelConfig
  plan: SharingPlan
  account: Account

  def tree(self) -> dict[str, Any]:
    """The parameters in the layer layout: `sa_jax.formats.lazy.LazyTensor`s.

    Raises:
      UserError: if a stored head differs from the embedding although the config ties them.
    """
    _check_tied(self.source, self.config)
    return lazy_tree(self.source, self.account.used, self.config.param_dtype)


def open_model(
  name: str | Path,
  plan: PlanLike = None,
  dtype: str | None = None,
  revision: str | None = None,
  strict: bool = False,
) -> Opened:
  """Opens a model's files under a plan; see `sa_jax.from_pretrained` for arguments and errors."""
  source = open_source(name, revision)
  config, stored = model_of(source, strict)
  config = _with_dtype(config, dtype)
  made = _asked(plan, stored)
  check_plan(config, made)
  try:
    return Opened(source, config, made, source.account(config, made))
  except UserError:
    if lost := sorted(set(made.anchors) - set(stored.anchors)):
      source.account(config, stored)  # report other errors first
      raise UserError(
        f"the plan '{made}' makes layers {lost} anchors, but {source.path} has no queries and keys for them: it was "
        f"made for the plan '{stored}'; start from the dense checkpoint"
      ) from None
    raise


def _check_tied(source: Source, config: ModelConfig) -> None:
  """Checks that a stored head equals the embedding if the config ties them.

  Raises:
    UserError: if it does not.
  """
  stored = [key for key in head_keys(config) if key in source.shapes] if config.tie_embeddings else []
  for key in stored:
    (embedding,) = (entry.key for entry in entries(config) if entry.path == ("embed", "embedding"))
    if embedding not in source.shapes:  # only the head's name is stored for the pair
      continue
    head, embedded = (source.read(each).astype(np.float32) for each in (key, embedding))
    # One of them may have been rounded to bfloat16.
    if not np.allclose(head, embedded, rtol=2**-8, atol=0):
      raise UserError(
        f"{source.path}: the config ties the output head to the embedding, but {key} differs from {embedding}; if the "
        "head was trained separately, set tie_word_embeddings to false in config.json"
      )


def _asked(plan: PlanLike, stored: SharingPlan) -> SharingPlan:
  """The requested plan. Strings and lists have no head maps: followers that keep their anchor keep their stored map."""
  if plan is None:
    return stored
  made = as_plan(plan, stored.num_layers)
  if isinstance(plan, SharingPlan):
    return made
  kept = [layer for layer in made.followers if made.source[layer] == stored.source[layer]]
  return made.with_head_maps({layer: stored.head_map_of(layer) for layer in kept})


def _with_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
  if dtype is None:
    return config
  if dtype not in hf_config.DTYPES:
    raise UserError(f"dtype {dtype!r} is not supported; use {', '.join(hf_config.DTYPES)}")
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
