"""To a hub that lies in memory: what would be uploaded, and what a hub that refuses says."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax import cli
from tests import tiny


@pytest.fixture
def checkpoint(tmp_path):
  model = tiny.model("0:1")
  sa_jax.save(tmp_path / "ours", model, tiny.params(model))
  return tmp_path / "ours"


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """The calls that a hub was sent, and a copy of what was uploaded."""
  import huggingface_hub

  calls = []

  class Api:
    def __init__(self, **options):
      pass

    def create_repo(self, name, **options):
      calls.append(("repo", name, options))

    def create_branch(self, name, **options):
      calls.append(("branch", name, options))

    def upload_folder(self, *, repo_id, folder_path, **options):
      calls.append(("upload", repo_id, options))
      shutil.copytree(folder_path, tmp_path / "uploaded")
      return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

  monkeypatch.setattr(huggingface_hub, "HfApi", Api)
  return calls


def test_what_is_uploaded_is_the_model(checkpoint, hub, tmp_path, capsys):
  assert cli.main(["push", str(checkpoint), "org/model", "--private", "--branch", "shared"]) == 0
  assert "https://hub/org/model/commit/1" in capsys.readouterr().out
  assert hub[:2] == [
    ("repo", "org/model", {"private": True, "exist_ok": True}),
    ("branch", "org/model", {"branch": "shared", "exist_ok": True}),
  ]
  assert (hub[2][0], hub[2][2]["revision"]) == ("upload", "shared")
  model, params = sa_jax.from_pretrained(tmp_path / "uploaded", layout="layers")
  ours, expected = sa_jax.from_pretrained(checkpoint, layout="layers")
  assert model.plan == ours.plan
  assert (tmp_path / "uploaded" / "modeling_shared_attention.py").exists()
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_plan_can_be_given(checkpoint, hub, tmp_path):
  assert cli.main(["push", str(checkpoint), "org/model", "--plan", "0:1-2"]) == 0
  assert str(sa_jax.from_pretrained(tmp_path / "uploaded")[0].plan) == "0:1-2"


@pytest.mark.parametrize(
  ("name", "endpoint", "told"),
  [
    ("org/model", "http://127.0.0.1:9", "upload to org/model failed: .*refused"),
    ("a/b/c", "http://127.0.0.1:9", "upload to a/b/c failed: Repo id must"),
  ],
)
def test_a_hub_that_does_not_answer(checkpoint, monkeypatch, name, endpoint, told):
  """Before anything is exported."""
  import huggingface_hub

  from sa_jax.formats import push

  real = huggingface_hub.HfApi
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: real(endpoint=endpoint, token="hf_x", **options))
  monkeypatch.setattr(push, "export", lambda *_, **__: pytest.fail("exported"))
  with pytest.raises(sa_jax.UserError, match=told) as raised:
    push.push(checkpoint, name)
  assert "\n" not in str(raised.value)


def test_who_is_not_known_is_told_how_to_log_in(checkpoint, monkeypatch):
  import huggingface_hub
  from huggingface_hub.errors import LocalTokenNotFoundError

  from sa_jax.formats import push

  class Api:
    def __init__(self, **options):
      pass

    def create_repo(self, *_, **__):
      raise LocalTokenNotFoundError("Token is required.")

  monkeypatch.setattr(huggingface_hub, "HfApi", Api)
  with pytest.raises(sa_jax.UserError, match="Token is required.; log in with `hf auth login`, or set HF_TOKEN"):
    push.push(checkpoint, "org/model")
