"""``python -m sa_jax``: the same as the console script ``sa-jax``."""

import sys

from sa_jax.cli import main

sys.exit(main())
