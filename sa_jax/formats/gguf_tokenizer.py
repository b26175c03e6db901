"""Tokenizers from GGUF files, as `tokenizers` objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import normalizers

from sa_jax.errors import UserError
from sa_jax.formats.byte_level import LLAMA_3_SPLIT, split_as
from sa_jax.formats.sentencepiece_model import Pieces, add_whole, backend_of, put_around
from sa_jax.formats.tokenizer import Tokenizer

if TYPE_CHECKING:
  from sa_jax.formats.gguf_file import GgufFile

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Like Llama 3's, but digits are separate.
_QWEN2_SPLIT = LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# How a GGUF's `tokenizer.ggml.pre` splits text before byte-level BPE, as llama.cpp defines the names.
_PRE_TOKENIZERS = {
  "smollm": (r"\p{N}", _GPT2_SPLIT),
  "gpt-2": (_GPT2_SPLIT,),
  "llama-bpe": (LLAMA_3_SPLIT,),
  "llama3": (LLAMA_3_SPLIT,),
  "llama-v3": (LLAMA_3_SPLIT,),
  "glm4": (LLAMA_3_SPLIT,),
  "chatglm-bpe": (LLAMA_3_SPLIT,),
  "qwen2": (_QWEN2_SPLIT,),
  "deepseek-r1-qwen": (_QWEN2_SPLIT,),
}
_OF_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
"""Pre-tokenizers whose texts begin with the start token, and which look up whole words before trying merges."""
_TEMPLATES = "tokenizer.chat_templates"
"""The names of additional chat templates, each stored under a separate key."""
_COMPOSED = ("qwen2",)
"""Pre-tokenizers whose original normalises text to NFC."""


def unsupported(file: GgufFile) -> str | None:
  """Why a GGUF file's tokenizer cannot be rebuilt, or None if it can."""
  kind, pre = file.optional("tokenizer.ggml.model", str), file.optional("tokenizer.ggml.pre", str)
  if kind == "llama" or (kind == "gpt2" and pre in _PRE_TOKENIZERS):
    return None
  return (
    f"{file.path} holds a tokenizer of kind {kind!r}, {pre!r}, which cannot be rebuilt; supported are 'llama', and "
    f"'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}; use the tokenizer.json of the original model instead"
  )


def from_gguf(file: GgufFile) -> Tokenizer:
  """The tokenizer in a GGUF file: byte-level BPE (``gpt2``), or SentencePiece's BPE (``llama``).

  Raises:
    UserError: if the tokenizer has another type.
  """
  if reason := unsupported(file):
    raise UserError(reason)
  kind, pre = file.optional("tokenizer.ggml.model", str), file.optional("tokenizer.ggml.pre", str)
  try:
    backend = _sentencepiece(file) if kind == "llama" else _byte_level(file, pre)
  except UserError:
    raise
  except Exception as error:  # tokenizers has no exception types of its own
    raise UserError(f"{file.path}: its tokenizer cannot be built: {error}") from None
  tokens = _list(file, "tokens")
  roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
  special = [
    (name, _token(file, tokens, key))
    for name, key in roles.items()
    if file.optional(f"tokenizer.ggml.{key}_token_id") is not None
  ]
  # By default, llama.cpp puts the start token before the texts of SentencePiece and of Llama 3.
  starts = file.optional("tokenizer.ggml.add_bos_token", bool)
  if starts is None:
    starts = kind == "llama" or pre in _OF_LLAMA_3
  before = [_token(file, tokens, "bos")] if starts else []
  after = [_token(file, tokens, "eos")] if file.optional("tokenizer.ggml.add_eos_token", bool) else []
  put_around(backend, before, after)
  named = [
    (str(name), file.optional(f"tokenizer.chat_template.{name}")) for name in file.optional(_TEMPLATES, list) or ()
  ]
  templates = tuple((name, text) for name, text in named if isinstance(text, str))
  return Tokenizer(backend, file.optional("tokenizer.chat_template", str), tuple(special), templates=templates)


def _token(file: GgufFile, tokens: list[str], role: str) -> str:
  """The token for a role such as ``bos``, which the metadata give by id."""
  name = f"tokenizer.ggml.{role}_token_id"
  index = file.field(name, int)
  if not 0 <= index < len(tokens):
    raise UserError(f"{file.path}: metadata value {name} is {index}, but there are {len(tokens)} tokens")
  return tokens[index]


_ENTRIES = {"tokens": str, "merges": str, "scores": float, "token_type": int}
"""Element types of the tokenizer's lists."""


def _list(file: GgufFile, name: str) -> list[Any]:
  """One of the tokenizer's lists.

  Raises:
    UserError: if it is missing, or has elements of the wrong type.
  """
  values = file.field(f"tokenizer.ggml.{name}", list)
  if odd := [value for value in values if type(value) is not _ENTRIES[name]][:1]:
    raise UserError(f"{file.path}: metadata value tokenizer.ggml.{name} contains the invalid entry {odd[0]!r}")
  return values


def _columns(file: GgufFile, *names: str) -> list[list[Any]]:
  """Lists with one entry per token.

  Raises:
    UserError: if one is missing, or lengths differ.
  """
  columns = [_list(file, name) for name in names]
  if len({len(column) for column in columns}) > 1:
    sizes = ", ".join(f"{len(column)} {name}" for name, column in zip(names, columns, strict=True))
    raise UserError(f"{file.path}: the tokenizer's lists must have one entry per token, not {sizes}")
  return columns


def _byte_level(file: GgufFile, pre: str) -> tokenizers.Tokenizer:
  """Byte-level BPE, as in GPT-2, with the file's merges."""
  tokens, kinds = _columns(file, "tokens", "token_type")
  vocabulary = {token: index for index, token in enumerate(tokens)}
  merges = [tuple(merge.split(" ", 1)) for merge in _list(file, "merges")]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=pre in _OF_LLAMA_3))
  split_as(backend, _PRE_TOKENIZERS[pre])
  if pre in _COMPOSED:
    backend.normalizer = normalizers.NFC()
  add_whole(backend, tokens, kinds)
  return backend


def _sentencepiece(file: GgufFile) -> tokenizers.Tokenizer:
  tokens, scores, kinds = _columns(file, "tokens", "scores", "token_type")
  return backend_of(Pieces(tokens, scores, kinds, file.optional("tokenizer.ggml.add_space_prefix", bool) is not False))
