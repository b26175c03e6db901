"""Exports models and uploads them to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sa_jax.display import Progress
from sa_jax.errors import UserError
from sa_jax.formats.export import export
from sa_jax.formats.opened import open_model
from sa_jax.plan import PlanLike


def push(
  src: str | Path,
  hub_id: str,
  *,
  plan: PlanLike = None,
  private: bool = False,
  branch: str | None = None,
  progress: Progress | None = None,
) -> str:
  """Exports a model and uploads the folder, with huggingface_hub's token and settings.

  The repository is created if it does not exist. Files of the same names are replaced and others kept, in one commit.

  Args:
    src: the model to read; see `sa_jax.from_pretrained`.
    hub_id: the repository, as ``org/model``.
    plan: see `sa_jax.from_pretrained`.
    private: whether a new repository is private.
    branch: the branch to commit to, created if needed; None for the main branch.
    progress: of the export; see `sa_jax.export`.

  Returns:
    The address of the commit.

  Raises:
    UserError: see `sa_jax.export`; if there is no token, or the hub refuses the upload; if possible, before the export.
  """
  from huggingface_hub import HfApi

  open_model(src, plan)  # fails before a repository is created
  api = HfApi(library_name="sa_jax")
  with _one_line_errors(hub_id):
    api.create_repo(hub_id, private=private, exist_ok=True)
    if branch is not None:
      api.create_branch(hub_id, branch=branch, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix="sa_jax-push-") as above:
    folder = Path(above) / "model"
    export(src, folder, plan=plan, progress=progress)
    with _one_line_errors(hub_id):
      done = api.upload_folder(
        repo_id=hub_id, folder_path=folder, revision=branch, commit_message="Upload a model exported by sa_jax"
      )
  return str(done.commit_url)


@contextlib.contextmanager
def _one_line_errors(hub_id: str) -> Iterator[None]:
  """Turns the hub client's exceptions, which include those of its HTTP library, into one-line errors."""
  from huggingface_hub.errors import LocalTokenNotFoundError

  try:
    yield
  except Exception as error:
    first = str(error).strip().split("\n")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    unknown = isinstance(error, LocalTokenNotFoundError) or status == 401
    remedy = "; log in with `hf auth login`, or set HF_TOKEN" if unknown else ""
    raise UserError(f"upload to {hub_id} failed: {first}{remedy}") from error
