"""Folders that are not what they seem: pipes, devices, absurd sizes, links that leave, storage that is no disk."""

import json
import os
import shutil
import sys

import pytest
import tokenizers

import sa_jax
from sa_jax import cli
from tests import tiny

MODEL = tiny.model("dense", num_layers=2)
SECRET = "what is none of the model's"


@pytest.fixture
def folder(tmp_path):
  made = tiny.write_hf(tmp_path / "model", MODEL, tiny.params(MODEL))
  tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(made / "tokenizer.json"))
  return made


def to_pipe(file):
  file.unlink(missing_ok=True)
  os.mkfifo(file)


def to_device(file):
  file.unlink(missing_ok=True)
  file.symlink_to("/dev/zero")


def to_folder(file):
  file.unlink(missing_ok=True)
  file.mkdir()


def to_terabyte(file):
  with file.open("wb") as opened:
    opened.truncate(2**40)  # a hole: nothing is written


SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (to_pipe, "is a pipe or a device, not a file"),
    (to_device, "is a pipe or a device, not a file"),
    (to_folder, "is a folder, not a file"),
    (to_terabyte, "has 1,099,511,627,776 bytes; at most 268,435,456 are allowed"),
  ],
)
@pytest.mark.parametrize("name", SMALL)
def test_small_files(folder, name, change, said):
  """Read, a pipe would wait for ever and the others fill the memory."""
  change(folder / name)
  door = sa_jax.from_pretrained if "config" in name and "tokenizer" not in name else sa_jax.load_tokenizer
  with pytest.raises(sa_jax.UserError, match=f"{name} {said}"):
    door(folder)


@pytest.mark.parametrize("change", [to_pipe, to_device, to_folder])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights(folder, name, change):
  (folder / "model.safetensors").unlink()
  change(folder / name)
  with pytest.raises(sa_jax.UserError, match=f"{name} is a (pipe or a device|folder), not a file"):
    sa_jax.from_pretrained(folder)


def test_a_pipe_in_place_of_a_model(tmp_path):
  os.mkfifo(tmp_path / "model.gguf")
  with pytest.raises(sa_jax.UserError, match=r"model\.gguf is a pipe or a device, not a file"):
    sa_jax.inspect(tmp_path / "model.gguf")


def test_extras_are_not_copied_through_links_that_leave(folder, tmp_path):
  (tmp_path / "secret").write_text(SECRET)
  (folder / "merges.txt").symlink_to("../secret")
  with pytest.raises(sa_jax.UserError, match=r"merges\.txt is a link to .*secret, outside its folder"):
    sa_jax.convert(folder, tmp_path / "out")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]
  (folder / "merges.txt").unlink()
  (folder / "merges.txt").symlink_to("tokenizer.json")  # within
  sa_jax.convert(folder, tmp_path / "out")
  assert (tmp_path / "out" / "merges.txt").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_the_hub_s_cache_is_made_of_links(folder, tmp_path):
  home = tmp_path / "models--org--tiny"
  (home / "blobs").mkdir(parents=True)
  snapshot = home / "snapshots" / ("a" * 40)
  snapshot.mkdir(parents=True)
  for number, file in enumerate(sorted(folder.iterdir())):
    shutil.copy(file, home / "blobs" / str(number))
    (snapshot / file.name).symlink_to(f"../../blobs/{number}")
  sa_jax.convert(snapshot, tmp_path / "out")
  assert sa_jax.load_tokenizer(tmp_path / "out").encode("a") == [0]
  (tmp_path / "secret").write_text(SECRET)
  (snapshot / "merges.txt").symlink_to("../../../secret")
  with pytest.raises(sa_jax.UserError, match="outside its folder"):
    sa_jax.convert(snapshot, tmp_path / "other")


@pytest.mark.parametrize(
  ("scheme", "said"),
  [("https", "unknown storage https://"), ("s3", "cannot be used: .*s3fs.*: pip install 'sa-jax.s3.'$")],
)
def test_other_storage_is_refused_by_name(folder, tmp_path, monkeypatch, scheme, said):
  """As paths these would be folders named after the scheme."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "s3fs", None)
  there = f"{scheme}://bucket/model"
  doors = (
    lambda: sa_jax.from_pretrained(there),
    lambda: sa_jax.load(there),
    lambda: sa_jax.load_tokenizer(there),
    lambda: sa_jax.inspect(there),
    lambda: sa_jax.convert(folder, there),
    lambda: sa_jax.export(folder, there),
    lambda: sa_jax.save(there, MODEL, tiny.params(MODEL)),
  )
  for door in doors:
    with pytest.raises(sa_jax.UserError, match=said):
      door()
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_storage_on_the_command_line(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as ended:
    raise SystemExit(cli.main(["cost", str(folder), "--json", "ftp://bucket/cost.json"]))
  assert ended.value.code == 2
  assert "ftp://bucket/cost.json: unknown storage ftp://" in " ".join(capsys.readouterr().err.split())
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
