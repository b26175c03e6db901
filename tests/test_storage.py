"""Buckets in the place of disks: ``gs://`` paths at every door, on a bucket of `tests.bucket`."""

import dataclasses
import functools
import json
import pickle
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import sa_jax
from sa_jax import buckets, cli
from sa_jax.analysis import plots
from sa_jax.analysis.judge import Judge
from sa_jax.analysis.texts import Text
from sa_jax.errors import UserError
from sa_jax.files import as_path, check_writable, make_folder, move, new_file, new_folder, read_text, write_text
from sa_jax.storage import Mirrored, local_copy
from sa_jax.train.interruption import Interruption
from sa_jax.train.loop import train
from tests import tiny
from tests.train import tiny_run

MODEL = tiny.model("1:2", num_layers=3, vocab_size=64)
SAID = "cannot be used: Forbidden"


def upload(folder: Path, name: str, objects) -> str:
  objects |= {f"{name}/{file.relative_to(folder)}": file.read_bytes() for file in folder.rglob("*") if file.is_file()}
  return f"gs://{name}"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
  return tiny.write_hf(tmp_path_factory.mktemp("hf") / "model", MODEL.clone(plan=sa_jax.SharingPlan.dense(3)), PARAMS)


PARAMS = tiny.params(tiny.model("dense", num_layers=3, vocab_size=64))


def test_a_path_is_what_its_name_says():
  for name in ("gs://bucket/a/b", Path("gs://bucket/a/b"), as_path("gs://bucket/a/b")):
    path = as_path(name)
    assert str(path) == "gs://bucket/a/b"
    assert (str(path / "c"), path.name, str(path.parent), path.resolve()) == (f"{path}/c", "b", "gs://bucket/a", path)
    assert pickle.loads(pickle.dumps(path)) == path
  assert as_path("a/b") == Path("a/b")
  with pytest.raises(UserError, match="unknown storage ftp://"):
    as_path("ftp://host/a")


def test_models_are_converted_opened_saved_and_exported_there(hf, gs):
  there = upload(hf, "bucket/hf", gs)
  _, want = sa_jax.from_pretrained(hf, "1:2")
  sa_jax.convert(there, "gs://bucket/made", "1:2", dtype=None)
  sa_jax.export("gs://bucket/made", "gs://bucket/back", plan="1:2")
  for source in (there, "gs://bucket/made", "gs://bucket/back"):
    tiny.assert_trees_equal(sa_jax.from_pretrained(source, "1:2")[1], want)
  sa_jax.save("gs://bucket/saved", MODEL, want)
  model, params = sa_jax.load("gs://bucket/saved")
  assert model.plan == MODEL.plan
  tiny.assert_trees_equal(params, want)
  with pytest.raises(UserError, match="gs://bucket/made exists already"):
    sa_jax.convert(there, "gs://bucket/made")
  assert not [name for name in gs if "unfinished" in name]


def test_each_device_reads_its_rows(hf, gs, monkeypatch):
  there = upload(hf, "bucket/hf", gs)
  read = []
  from sa_jax.formats import shards

  whole = shards.range_of
  monkeypatch.setattr(shards, "range_of", lambda *a: read.append((a[2], a[3].stop - a[3].start)) or whole(*a))
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
  _, params = sa_jax.from_pretrained(there, "dense", mesh=mesh)
  tiny.assert_trees_equal(params, sa_jax.from_pretrained(hf, "dense", mesh=mesh)[1])
  # Queries, keys, values, gate, up, embedding and head are split along the file's rows; none is read twice for `data`.
  assert sum(found < size for size, found in read) == 2 * (5 * 3 + 2)
  assert sum(found for _, found in read) < 1.4 * sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))


@pytest.mark.slow
def test_a_run_goes_on_from_a_bucket(gs, tmp_path, monkeypatch):
  gs["bucket/text.txt"] = tiny_run.TEXT.encode()
  data = tiny_run.config(tmp_path / "x").data
  reading = dataclasses.replace(data.reading, cache=as_path("gs://bucket/cache"))
  data = dataclasses.replace(data, train=(as_path("gs://bucket/text.txt"),), reading=reading)
  shape = dataclasses.replace(tiny_run.SHAPE, num_layers=2)
  config = lambda out: tiny_run.config(out, steps=6, data=data, shape=shape, plan="0:1")
  whole = train(config(tmp_path / "whole"))
  monkeypatch.setattr(Interruption, "requested", lambda self, step: step == 5)
  first = train(config(as_path("gs://bucket/run")))
  assert (first.interrupted, first.step, first.model) == (True, 5, None)
  monkeypatch.setattr(Interruption, "requested", lambda self, step: False)
  second = train(config(as_path("gs://bucket/run")))
  assert str(second.model) == "gs://bucket/run/model"
  tiny.assert_trees_equal(sa_jax.from_pretrained(second.model)[1], sa_jax.from_pretrained(whole.model)[1])
  lines = [json.loads(line) for line in gs["bucket/run/metrics.jsonl"].splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == [*range(1, 7)]
  assert [line["loss"] for line in lines if "loss" in line][-1] > 0
  assert json.loads(gs["bucket/run/config.json"])["steps"] == 6
  assert any(name.startswith("bucket/cache/") and name.endswith("tokens.bin") for name in gs)


def test_a_run_that_another_took_over_ends(gs, tmp_path):
  from sa_jax.train.folder import locked

  folder = as_path("gs://bucket/run")
  with locked(folder) as check:
    check()
    with locked(folder) as later:
      with pytest.raises(UserError, match="another run has taken over gs://bucket/run"):
        check()
      later()


def test_records_json_and_pictures(hf, gs):
  there = upload(hf, "bucket/hf", gs)
  assert cli.main(["cost", there, "--plan", "1:2", "--json", "gs://bucket/cost.json"]) == 0
  assert json.loads(gs["bucket/cost.json"])
  plots.similarity_map(np.eye(3), as_path("gs://bucket/map.png"), title="a")
  assert gs["bucket/map.png"].startswith(b"\x89PNG")
  texts = [Text("one", tiny.tokens(4, 8), tiny.tokens(4, 8, seed=1))]
  dense = tiny.model("dense", num_layers=3, vocab_size=64)
  plan = sa_jax.SharingPlan.parse("1:2", 3)
  record = Path("gs://bucket/record.json")
  losses = Judge(dense, PARAMS, texts, None, maps=False, record=record).losses(plan)
  assert json.loads(gs["bucket/record.json"])["plans"] == {"1:2": losses.tolist()}
  again = Judge(dense, PARAMS, texts, None, maps=False, record=record)
  assert [str(each) for each in again.measured] == ["1:2"]


def test_folders_that_were_left_unfinished(hf, gs):
  folder = as_path("gs://bucket/made")

  def half():
    with new_folder(folder) as made:
      (made / "config.json").write_text("{}")
      sa_jax.from_pretrained(made)

  with pytest.raises(UserError, match="unfinished"):
    half()
  assert gs == {}
  gs |= {"bucket/made/.unfinished": b"a host\n", "bucket/made/old": b"old"}  # a kill leaves these
  with pytest.raises(UserError, match="gs://bucket/made is unfinished"):
    sa_jax.from_pretrained(folder)
  with new_folder(folder) as made:
    write_text(made / "new", "new")
  assert gs == {"bucket/made/new": b"new"}
  move(folder, as_path("gs://bucket/moved/1"))
  assert gs == {"bucket/moved/1/new": b"new"}
  assert read_text(local_copy(folder.parent / "moved" / "1" / "new")) == "new"


def test_what_grows_is_copied_as_it_grows(gs, monkeypatch):
  mirror = Mirrored(as_path("gs://bucket/run"))
  file = mirror.local / "inner" / "a"
  file.parent.mkdir()
  file.write_text("1")
  mirror.push()
  assert gs == {"bucket/run/inner/a": b"1"}
  file.write_text("12")
  mirror._resting = time.monotonic() + 100
  mirror.push()
  assert gs == {"bucket/run/inner/a": b"1"}
  mirror.close()
  assert gs == {"bucket/run/inner/a": b"12"}
  assert not file.exists()


def test_a_file_that_fails_leaves_the_old_one(gs):
  path = as_path("gs://bucket/a")
  write_text(path, "old")

  def half():
    with new_file(path) as file:
      file.write_text("half")
      raise RuntimeError

  with pytest.raises(RuntimeError):
    half()
  assert gs == {"bucket/a": b"old"}


def test_a_bucket_that_cannot_be_used_is_one_line(hf, gs, monkeypatch, capsys):
  there = "gs://forbidden/a"
  for door in (
    lambda: sa_jax.from_pretrained(there),
    lambda: sa_jax.convert(hf, there),
    lambda: check_writable(as_path(there)),
    lambda: make_folder(as_path(there)),
    lambda: train(tiny_run.config(as_path(there), data=tiny_run.DataConfig(train=(as_path("gs://bucket/none"),)))),
  ):
    with pytest.raises(UserError, match=SAID) as caught:
      door()
    assert "\n" not in str(caught.value)
  assert cli.main(["perplexity", there, "gs://bucket/text"]) == 2
  assert SAID in " ".join(capsys.readouterr().err.split())
  assert cli.main(["doctor", there]) == 2
  told = capsys.readouterr()
  assert "any" not in told.out + told.err, "the user has named the folder alone"
  assert (told.out + told.err).count(SAID) == 1
  monkeypatch.setattr(buckets, "_PATIENCE", 0.05)
  slow = buckets._one_line_errors(functools.wraps(time.sleep)(lambda self: time.sleep(0.5)))
  with pytest.raises(UserError, match="gs://silent does not respond within 0 s; check its name"):
    slow(as_path("gs://silent/a"))
