"""500 ways to damage a checkpoint: each ends in a clear error, quickly, in little memory, with nothing written."""

import copy
import json
import random
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sa_jax
from sa_jax.formats.table import entries

COUNT = 500
CONFIG = sa_jax.ModelConfig(
  vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, family="qwen3",
  qk_norm="head", window=8, local_layers=(1,),
)  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
NUMBERS = (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "sliding_window")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
  folder = tmp_path_factory.mktemp("valid") / "model"
  folder.mkdir()
  rng = np.random.default_rng(0)
  tensors = {entry.key: rng.normal(size=entry.shape).astype(np.float32) for entry in entries(CONFIG)}
  keys = list(tensors)
  halves = (keys[: len(keys) // 2], keys[len(keys) // 2 :])
  for name, half in zip(SHARDS, halves):
    save_file({key: tensors[key] for key in half}, folder / name)
  weight_map = {key: name for name, half in zip(SHARDS, halves) for key in half}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
  return folder


def edit_json(file, change):
  values = json.loads(file.read_text())
  change(values)
  file.write_text(json.dumps(values))


def edit_header(file, change):
  data = file.read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  change(header)
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def any_tensor(rng, header):
  return header[rng.choice([key for key in header if key != "__metadata__"])]


def flip_header(rng, folder):
  """A changed byte that changes the header's meaning."""
  file = folder / rng.choice(SHARDS)
  data = bytearray(file.read_bytes())
  size = int.from_bytes(data[:8], "little")
  before = json.loads(data[8 : 8 + size])
  while True:
    flipped = copy.copy(data)
    flipped[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
    try:
      if flipped[:8] == data[:8] and json.loads(flipped[8 : 8 + size]) == before:
        continue
    except ValueError:
      pass
    file.write_bytes(flipped)
    return


def truncate(rng, folder):
  file = folder / rng.choice([*SHARDS, "config.json", "model.safetensors.index.json"])
  data = file.read_bytes()
  file.write_bytes(data[: rng.randrange(len(data))])


def rename_key(rng, folder):
  def change(header):
    key = rng.choice([key for key in header if key != "__metadata__"])
    header[rng.choice([key + "x", key.upper(), "", "lm_head.bias", "../../" + key])] = header.pop(key)

  edit_header(folder / rng.choice(SHARDS), change)


def wrong_shape(rng, folder):
  file = folder / rng.choice(SHARDS)
  tensors = load_file(file)
  key = rng.choice(list(tensors))
  old = tensors[key]
  options = [old[1:], old[None], np.concatenate([old, old]), np.zeros((), np.float32), old[:0]]
  if old.ndim == 2:
    options += [np.ascontiguousarray(old.T), old.reshape(-1)] if old.shape[0] != old.shape[1] else [old.reshape(-1)]
  tensors[key] = np.ascontiguousarray(rng.choice(options))
  save_file(tensors, file)


def wrong_dtype(rng, folder):
  file = folder / rng.choice(SHARDS)
  tensors = load_file(file)
  key = rng.choice(list(tensors))
  tensors[key] = tensors[key].astype(rng.choice([np.int8, np.int32, np.int64, np.uint8, np.bool_]))
  save_file(tensors, file)


def header_dtype(rng, folder):
  change = lambda header: any_tensor(rng, header).update(
    dtype=rng.choice(["F16", "F64", "F8_E4M3", "I32", "", "X", 7, None])
  )
  edit_header(folder / rng.choice(SHARDS), change)


def missing_file(rng, folder):
  (folder / rng.choice([*SHARDS, "config.json"])).unlink()


def index_elsewhere(rng, folder):
  names = [
    "../model.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "config.json", "a\\..\\b", "~",
    "x" * 5000, "../" * 50 + "etc/passwd", "\0.safetensors", 7, None, ["a"], SHARDS[0] + "/../" + SHARDS[1],
  ]  # fmt: skip

  def change(values):
    weight_map = values["weight_map"]
    weight_map[rng.choice(list(weight_map))] = rng.choice(names)

  edit_json(folder / "model.safetensors.index.json", change)


def index_nonsense(rng, folder):
  values = [{}, {"weight_map": None}, {"weight_map": []}, [], 3, {"weight_map": {}}, {"weight_map": {"x": SHARDS[0]}}]
  (folder / "model.safetensors.index.json").write_text(json.dumps(rng.choice(values)))


def swapped_index(rng, folder):
  def change(values):
    key = rng.choice(list(values["weight_map"]))
    values["weight_map"][key] = SHARDS[values["weight_map"][key] == SHARDS[0]]

  edit_json(folder / "model.safetensors.index.json", change)


def absurd_sizes(rng, folder):
  file = folder / rng.choice(SHARDS)
  big = rng.choice([2**31, 2**40, 2**63 - 1, 2**64, 10**30])
  kind = rng.randrange(4)
  if kind == 0:
    file.write_bytes(min(big, 2**64 - 1).to_bytes(8, "little") + file.read_bytes()[8:])
  elif kind == 1:
    edit_header(file, lambda header: any_tensor(rng, header).update(shape=[big, big]))
  elif kind == 2:
    edit_header(file, lambda header: any_tensor(rng, header).update(data_offsets=[0, big]))
  else:
    edit_header(file, lambda header: any_tensor(rng, header).update(data_offsets=[big, big + 4]))


def config_missing(rng, folder):
  edit_json(folder / "config.json", lambda values: values.pop(rng.choice([*SIZES, "model_type"])))


def config_number(rng, folder):
  value = rng.choice([-1, 0, -(10**12), "8", [], {}, 1.5e400, float("nan"), 10**40, True, 2**31])
  edit_json(folder / "config.json", lambda values: values.update({rng.choice(NUMBERS[:8]): value}))


def config_other(rng, folder):
  changes = [
    {"rms_norm_eps": -1e-6}, {"rms_norm_eps": "x"}, {"sliding_window": 0}, {"sliding_window": -3}, {"head_dim": 3},
    {"hidden_act": "relu"}, {"attention_bias": True}, {"attention_bias": "no"}, {"tie_word_embeddings": 3},
    {"rope_parameters": {"rope_theta": -1}}, {"rope_parameters": {"rope_type": "yarn"}}, {"rope_parameters": 3},
    {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, {"layer_types": ["full_attention"]},
    {"layer_types": [1, 2]}, {"layer_types": "full"}, {"eos_token_id": "x"}, {"eos_token_id": [None]},
    {"dtype": "int8"},
    {"shared_attention": {"source": [0, 5]}}, {"shared_attention": {"source": [1, 1]}}, {"shared_attention": 3},
    {"shared_attention": {"source": [0, 0]}}, {"model_type": "bert"}, {"model_type": 3},
    {"num_experts": 8, "model_type": "m"},
    {"quantization_config": {"bits": 4}}, {"is_encoder_decoder": True}, {"num_hidden_layers": 10_000},
    {"num_hidden_layers": 1}, {"vocab_size": 41}, {"use_sliding_window": "yes"},
  ]  # fmt: skip
  edit_json(folder / "config.json", lambda values: values.update(rng.choice(changes)))


def not_json(rng, folder):
  name = rng.choice(["config.json", "model.safetensors.index.json"])
  (folder / name).write_bytes(
    rng.choice([b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"{", b"9" * 10_000, b"null"])
  )


MUTATIONS = (
  flip_header, truncate, rename_key, wrong_shape, wrong_dtype, header_dtype, missing_file, index_elsewhere,
  index_nonsense, swapped_index, absurd_sizes, config_missing, config_number, config_other, not_json,
)  # fmt: skip


def test_valid(valid, tmp_path):
  sa_jax.convert(valid, tmp_path / "out")


def test_mutations(valid, tmp_path):
  rng = random.Random(0)
  folder, out = tmp_path / "model", tmp_path / "out"
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  survived, messages, slowest = [], [], 0.0
  for number in range(COUNT):
    shutil.copytree(valid, folder)
    mutate = MUTATIONS[number % len(MUTATIONS)]
    mutate(rng, folder)
    began = time.perf_counter()
    try:
      sa_jax.convert(folder, out)
      survived.append((number, mutate.__name__))
    except ValueError as error:
      messages.append(str(error))
    slowest = max(slowest, time.perf_counter() - began)
    assert [path for path in tmp_path.iterdir() if path != folder] == [], (number, mutate.__name__)
    shutil.rmtree(folder)
  assert survived == []
  assert len(messages) == COUNT
  assert min(map(len, messages)) > 20
  assert slowest < 2
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200


def test_nothing_outside_is_opened(valid, tmp_path, monkeypatch):
  """The file that an index points to outside the folder is not even opened."""
  folder = tmp_path / "model"
  shutil.copytree(valid, folder)
  shutil.copy(valid / SHARDS[0], tmp_path / "outside.safetensors")
  edit_json(
    folder / "model.safetensors.index.json",
    lambda values: values.update(weight_map=dict.fromkeys(values["weight_map"], "../outside.safetensors")),
  )
  opened, really_open = [], Path.open
  monkeypatch.setattr(Path, "open", lambda self, *args, **kw: opened.append(self) or really_open(self, *args, **kw))
  with pytest.raises(ValueError, match=r"outside\.safetensors"):
    sa_jax.convert(folder, tmp_path / "out")
  assert {path.parent for path in opened} == {folder}
