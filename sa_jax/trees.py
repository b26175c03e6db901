"""Type aliases for pytrees of arrays, whose nesting Python's types cannot express."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Params = Mapping[str, Any]
"""Parameters as nested dictionaries. Leaves are arrays, `jax.ShapeDtypeStruct`s or shardings."""

Tree = Any
"""Any pytree of arrays, `jax.ShapeDtypeStruct`s or shardings."""
