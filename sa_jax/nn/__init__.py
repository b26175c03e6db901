"""Flax modules: parameters, names and scan around the mathematics of `sa_jax.ops`."""

from sa_jax.nn.attention import AnchorAttention, FollowerAttention
from sa_jax.nn.block import AnchorBlock, FollowerBlock, Mlp
from sa_jax.nn.cache import Cache, LayerCache
from sa_jax.nn.norm import RMSNorm
from sa_jax.nn.planned import PlanArrays, PlannedBlock, PlannedTransformer
from sa_jax.nn.state import AttentionWeights, QueryKey
from sa_jax.nn.transformer import Group, Layers, Runs, Transformer

__all__ = [
  "AnchorAttention",
  "AnchorBlock",
  "AttentionWeights",
  "Cache",
  "FollowerAttention",
  "FollowerBlock",
  "Group",
  "LayerCache",
  "Layers",
  "Mlp",
  "PlanArrays",
  "PlannedBlock",
  "PlannedTransformer",
  "QueryKey",
  "RMSNorm",
  "Runs",
  "Transformer",
]
