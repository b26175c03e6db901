"""All temporary patches of lm-eval, for what it has no setting for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator


@contextlib.contextmanager
def quick() -> Iterator[None]:
  """Within it, lm-eval compiles a task's template once, does not query torch or git for versions, and shows no bars.

  By default it compiles the template for each document, which dominates its time besides the model. Importing torch and
  transformers takes seconds and hundreds of megabytes, and is irrelevant for a model that does not use them. Git would
  be run in the command's current folder, and complains if that is not a repository.
  """
  import lm_eval.api.task as tasks
  import lm_eval.evaluator as evaluator
  import lm_eval.utils as lm_eval

  bars, commit = tasks.tqdm, evaluator.get_git_commit_hash
  kept = lm_eval.is_torch_available, lm_eval.is_transformers_available
  lm_eval.env.from_string = functools.cache(lm_eval.env.from_string)  # on the instance, overriding its class's method
  lm_eval.is_torch_available = lm_eval.is_transformers_available = lambda: False
  evaluator.get_git_commit_hash = lambda: None
  tasks.tqdm = functools.partial(bars, disable=True)  # bars over documents, also printed to files and pipes
  try:
    yield
  finally:
    del lm_eval.env.from_string
    tasks.tqdm, evaluator.get_git_commit_hash = bars, commit
    lm_eval.is_torch_available, lm_eval.is_transformers_available = kept
