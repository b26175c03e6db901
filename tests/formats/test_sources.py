"""PyTorch's own files, hub ids, and what travels along."""

import json
import os
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax.formats.hub import locate
from tests.formats import hf_models

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sources") / "llama"
  hf_models.build("llama", folder, torch.bfloat16)
  return folder


def as_bin(folder, to, shards, **options):
  """The folder with ``pytorch_model.bin`` instead of safetensors."""
  from safetensors.torch import load_file

  to.mkdir()
  shutil.copy(folder / "config.json", to)
  tensors = load_file(folder / "model.safetensors")
  names = (
    ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i:05d}-of-{shards:05d}.bin" for i in range(shards)]
  )
  weight_map = {key: names[number % shards] for number, key in enumerate(tensors)}
  for name in names:
    torch.save({key: tensors[key] for key in tensors if weight_map[key] == name}, to / name, **options)
  if shards > 1:
    (to / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return to


def assert_same(found, expected):
  for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_equals_safetensors(folder, tmp_path, shards, options):
  opened = sa_jax.from_pretrained(as_bin(folder, tmp_path / "bin", shards, **options), layout="layers")
  assert_same(opened[1], sa_jax.from_pretrained(folder, layout="layers")[1])


class Evil:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_wants_more_is_refused(folder, tmp_path, zipped):
  target = as_bin(folder, tmp_path / "bin", 1)
  tensors = {"model.norm.weight": torch.zeros(3), "evil": Evil(tmp_path / "owned")}
  torch.save(tensors, target / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
  with pytest.raises(ValueError, match="complete PyTorch file of tensors only"):
    sa_jax.from_pretrained(target)
  (target / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "owned"), protocol=2))
  with pytest.raises(ValueError, match="complete PyTorch file of tensors only"):
    sa_jax.from_pretrained(target)
  assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ([torch.zeros(2)], "does not contain a dictionary from names to tensors"),
    ({"a": 3}, "a is a int"),
    ({"a": torch.zeros(2, dtype=torch.int64)}, "a is of type int64"),
    ("quantised", "a is of type qint8"),
    ({"a": torch.eye(3).to_sparse()}, "a is a sparse_coo tensor"),
    ({"a": torch.empty(3, device="meta")}, "a is a tensor without data, of device meta"),
  ],
)
@pytest.mark.filterwarnings("ignore:.*quantized tensor", "ignore:TypedStorage")
def test_bin_of_other_things(folder, tmp_path, content, said):
  if content == "quantised":
    content = {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
  target = as_bin(folder, tmp_path / "bin", 1)
  torch.save(content, target / "pytorch_model.bin")
  with pytest.raises(sa_jax.UserError, match=said) as caught:
    sa_jax.from_pretrained(target)
  assert "\n" not in str(caught.value)


def test_compressed_bin_is_refused(folder, tmp_path):
  """Mapped, its tensors would be the compressed bytes."""
  target = as_bin(folder, tmp_path / "bin", 1)
  with zipfile.ZipFile(target / "pytorch_model.bin") as stored:
    files = {name: stored.read(name) for name in stored.namelist()}
  with zipfile.ZipFile(target / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
    for name, data in files.items():
      packed.writestr(name, data)
  with pytest.raises(sa_jax.UserError, match=r"pytorch_model\.bin is compressed .*save it again with torch\.save"):
    sa_jax.from_pretrained(target)


def test_damaged_bin(folder, tmp_path):
  target = as_bin(folder, tmp_path / "bin", 1)
  data = (target / "pytorch_model.bin").read_bytes()
  for part in (data[:0], data[:50], data[: len(data) // 2], data[:-30]):
    (target / "pytorch_model.bin").write_bytes(part)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
      sa_jax.from_pretrained(target)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
  """A hub cache that holds one model under two revisions, and no network."""
  import huggingface_hub.constants

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  home = tmp_path / "cache" / "models--org--tiny"
  for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / revision).write_text(commit)
  config = home / "snapshots" / ("b" * 40) / "config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.125}))


def test_hub_id(folder, hub, tmp_path):
  model, params = sa_jax.from_pretrained("org/tiny", layout="layers")
  assert_same(params, sa_jax.from_pretrained(folder, layout="layers")[1])
  newer, _ = sa_jax.from_pretrained("org/tiny", revision="v2", layout="layers")
  assert (model.config.norm_eps, newer.config.norm_eps) == (1e-6, 0.125)
  assert "model.norm.weight" in {entry.key for entry in sa_jax.inspect("org/tiny", revision="v2").used}
  sa_jax.convert("org/tiny", tmp_path / "ours", revision="v2")
  assert json.loads((tmp_path / "ours" / "config.json").read_text())["rms_norm_eps"] == 0.125
  named, _ = sa_jax.from_pretrained("org/tiny@v2", layout="layers")
  assert named == newer
  sa_jax.export("org/tiny@v2", tmp_path / "exported")
  assert "base_model: org/tiny\n" in (tmp_path / "exported" / "README.md").read_text()
  with pytest.raises(
    ValueError, match="org/tiny@v2 already contains a revision, but `revision` is 'main'; give only one"
  ):
    sa_jax.from_pretrained("org/tiny@v2", revision="main")
  with pytest.raises(ValueError, match="org/absent is not a file or folder, and the hub cannot be reached"):
    sa_jax.from_pretrained("org/absent")
  with pytest.raises(ValueError, match="is for models on the hub"):
    sa_jax.from_pretrained(folder, revision="v2")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_only_what_is_needed_is_downloaded(folder, tmp_path, monkeypatch, weights):
  """Of a repository with all that such have: neither the other form of the weights, nor what lies in folders."""
  import huggingface_hub
  from huggingface_hub.utils import filter_repo_objects

  stored = [
    "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth",
    "original/params.json", "onnx/model.onnx", "tf_model.h5", "training_args.bin", "trainer_state.json",
  ]  # fmt: skip
  if weights != "model.safetensors":
    stored = [name for name in stored if not name.endswith(".safetensors")]
  asked = []

  def download(name, *, revision, allow_patterns, ignore_patterns):
    asked.append((name, revision))
    for each in filter_repo_objects(stored, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
      (tmp_path / each).write_bytes((folder / each).read_bytes() if (folder / each).exists() else b"")
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  names = lambda: {path.name for path in tmp_path.iterdir()}
  locate("org/all@v2", need="config")
  assert names() == {"config.json", "generation_config.json"}
  locate("org/all@v2", need="tokenizer")
  assert names() == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
  locate("org/all@v2")
  assert names() == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", weights}
  assert set(asked) == {("org/all", "v2")}


def test_extras_travel(folder, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(folder, source)
  extras = {
    "tokenizer.model": "\x00binary", "chat_template.jinja": "{{ messages }}", "special_tokens_map.json": "{}",
    "generation_config.json": '{"eos_token_id": [7, 8], "temperature": 0.6}', "vocab.json": "{}", "merges.txt": "a b",
  }  # fmt: skip
  for name, text in extras.items():
    (source / name).write_text(text)
  sa_jax.convert(source, tmp_path / "ours")
  sa_jax.export(tmp_path / "ours", tmp_path / "back")
  for name, text in extras.items():
    assert (tmp_path / "ours" / name).read_text() == (tmp_path / "back" / name).read_text() == text
  assert sa_jax.from_pretrained(tmp_path / "back")[0].config.eos_token_ids == (7, 8)


def test_inspect_packed(tmp_path):
  hf_models.build("phi3", tmp_path / "phi3")
  found = sa_jax.inspect(tmp_path / "phi3", "1:2-3")
  assert found.dropped == {
    f"model.layers.{layer}.self_attn.qkv_proj.weight[{name}_proj]": f"layer {layer} follows layer 1"
    for name in "qk"
    for layer in (2, 3)
  }
