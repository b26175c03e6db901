"""Names for trees of arrays, whose nesting Python's types cannot describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Params = Mapping[str, Any]
"""Parameters in dictionaries nested as the modules are; at the leaves arrays, or shapes and dtypes, or shardings."""

Tree = Any
"""Any pytree of arrays, or of what stands for them."""
