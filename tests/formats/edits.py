"""The small Llama of the fixtures, and changes to its Hugging Face folder."""

import json
from pathlib import Path

from safetensors.numpy import load_file, save_file

SMALL = {"plan": "dense", "num_layers": 3, "vocab_size": 64}


def edit_tensors(folder: Path, change) -> None:
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **values) -> None:
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | values))
