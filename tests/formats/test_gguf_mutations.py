"""Ways to damage a GGUF file: each ends in a clear error or in the model that the file describes, quickly."""

import random
import struct
import time
import warnings

import gguf
import pytest

import sa_jax
from tests.formats.test_gguf import small, write_gguf

TYPES = gguf.GGUFValueType
VALUES = [
  *((value, TYPES.INT64, None) for value in (0, -1, 3, 2**31, 2**62)),
  *((value, TYPES.FLOAT32, None) for value in (1e-9, float("nan"), float("inf"), -2.5)),
  *((value, TYPES.STRING, None) for value in ("", "8", "\ud7ff" * 3)),
  (True, TYPES.BOOL, None),
  *((values, TYPES.ARRAY, TYPES.INT32) for values in ([1], [1, 2])),
  (["a"], TYPES.ARRAY, TYPES.STRING),
  ([0.5] * 40, TYPES.ARRAY, TYPES.FLOAT32),
]
DEEP = b"\x09\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"
"""An array of one array, and so on."""


def with_tokenizer(writer, kind):
  tokens = ["<unk>", "<s>", "</s>", *(chr(33 + number) for number in range(60)), "ab"]
  writer.add_tokenizer_model(kind)
  writer.add_tokenizer_pre("default" if kind == "llama" else "llama-bpe")
  writer.add_token_list(tokens)
  writer.add_token_scores([-float(number) for number in range(64)])
  writer.add_token_types([2, 3, 3, *[1] * 61])
  writer.add_token_merges(["a b"])
  writer.add_add_bos_token(True)
  writer.add_chat_template("{{ messages }}")


def other_value(rng, path):
  """A metadata value that is another, or none."""

  def change(writer):
    with_tokenizer(writer, rng.choice(["llama", "gpt2"]))
    fields = writer.kv_data[0]
    key = rng.choice([name for name in fields if name != "GGUF.version"])
    if rng.random() < 0.2:
      del fields[key]
      return
    fields[key] = gguf.gguf_writer.GGUFValue(*rng.choice(VALUES))

  write_gguf(path, *small(), change=change)


def unread_value(rng, path):
  """A metadata value that the file of such a model has not."""
  keys = (
    "attention.scale logit_scale attention.sliding_window rope.scaling.type rope.scaling.factor attention.causal "
    "attention.key_length attention.value_length expert_count rope.scaling.yarn_beta_fast nextn_predict_layers"
  ).split()

  def change(writer):
    writer.kv_data[0][f"llama.{rng.choice(keys)}"] = gguf.gguf_writer.GGUFValue(*rng.choice(VALUES))

  write_gguf(path, *small(), change=change)


def flipped(rng, path):
  """A bit of what stands before the weights."""
  write_gguf(path, *small())
  data = bytearray(path.read_bytes())
  data[rng.randrange(1500)] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def cut(rng, path):
  write_gguf(path, *small())
  data = path.read_bytes()
  path.write_bytes(data[: rng.randrange(len(data))])


def lying(rng, path):
  """A count or a length that is beyond the file, and arrays in arrays without an end."""
  write_gguf(path, *small())
  data = bytearray(path.read_bytes())
  absurd = struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 2**40, 10**7]))
  where = rng.choice([8, 16, 24, data.index(b"llama.block_count") - 8, data.index(b"token_embd") - 8])
  data[where : where + 8] = absurd
  if rng.random() < 0.2:
    place = data.index(b"llama.block_count") + len(b"llama.block_count")
    data[place : place + 8] = DEEP * 5000
  path.write_bytes(data)


MUTATIONS = (other_value, unread_value, flipped, cut, lying)


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_damage_is_told_in_words(mutate, tmp_path):
  rng = random.Random(mutate.__name__)
  slowest, told = 0.0, []
  for number in range(120):
    path = tmp_path / f"{number}.gguf"
    mutate(rng, path)
    began = time.perf_counter()
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = sa_jax.from_pretrained(path)
        if mutate is other_value:
          sa_jax.load_tokenizer(path).encode("ab ba")
      assert model.config.embed_dim == small()[0].config.embed_dim, number
    except sa_jax.UserError as error:
      told.append(str(error))
    slowest = max(slowest, time.perf_counter() - began)
    path.unlink()
  assert len(told) > 40
  assert min(map(len, told)) > 20
  assert slowest < 2
