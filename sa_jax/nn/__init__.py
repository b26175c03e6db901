"""Flax modules: parameters, names and scans around the pure functions of `sa_jax.ops`."""

from sa_jax.nn.attention import AnchorAttention, FollowerAttention, MixedAttention
from sa_jax.nn.block import BLOCK_OUTPUTS, AnchorBlock, Blocks, FollowerBlock, Middle, MixedBlock
from sa_jax.nn.cache import Cache, LayerCache
from sa_jax.nn.experts import ROUTER_SCORES, Moe
from sa_jax.nn.layers import Group, Layers, Runs
from sa_jax.nn.mlp import Mlp, PlainMlp
from sa_jax.nn.norm import Norm
from sa_jax.nn.planned import PlanArrays, PlannedBlock, PlannedTransformer
from sa_jax.nn.state import AttentionWeights, QueryKey
from sa_jax.nn.transformer import GradualTransformer, Transformer

__all__ = [
  "BLOCK_OUTPUTS",
  "ROUTER_SCORES",
  "AnchorAttention",
  "AnchorBlock",
  "AttentionWeights",
  "Blocks",
  "Cache",
  "FollowerAttention",
  "FollowerBlock",
  "GradualTransformer",
  "Group",
  "LayerCache",
  "Layers",
  "Middle",
  "MixedAttention",
  "MixedBlock",
  "Mlp",
  "Moe",
  "Norm",
  "PlainMlp",
  "PlanArrays",
  "PlannedBlock",
  "PlannedTransformer",
  "QueryKey",
  "Runs",
  "Transformer",
]
