"""What is changed in lm-eval while it runs, because it has no setting for it; all of it is here, and undone after."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator


@contextlib.contextmanager
def quick() -> Iterator[None]:
  """Inside, lm-eval compiles a task's template once, asks neither torch nor git for its version, and draws no bars.

  It compiles the template anew for each document, which is most of what it does beside the model. Importing torch and
  transformers takes seconds and hundreds of megabytes, and tells nothing of a model that does not use them. Git would
  be asked about the folder that the command happens to run in, and complains where that is no repository.
  """
  import lm_eval.api.task as tasks
  import lm_eval.evaluator as evaluator
  import lm_eval.utils as lm_eval

  bars, commit = tasks.tqdm, evaluator.get_git_commit_hash
  kept = lm_eval.is_torch_available, lm_eval.is_transformers_available
  lm_eval.env.from_string = functools.cache(lm_eval.env.from_string)  # on the instance, over its class's method
  lm_eval.is_torch_available = lm_eval.is_transformers_available = lambda: False
  evaluator.get_git_commit_hash = lambda: None
  tasks.tqdm = functools.partial(bars, disable=True)  # of documents that are put into words, also into files and pipes
  try:
    yield
  finally:
    del lm_eval.env.from_string
    tasks.tqdm, evaluator.get_git_commit_hash = bars, commit
    lm_eval.is_torch_available, lm_eval.is_transformers_available = kept
