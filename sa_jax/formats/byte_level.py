"""Byte-level BPE as a `tokenizers` object, from byte strings in the order of their ranks.

Mistral's ``tekken.json`` and tiktoken files are such lists. BPE merges the neighbours whose joint string has the lowest
rank, so the merges are all splits of a string into two known strings, ordered by the string's rank.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, pre_tokenizers

from sa_jax.errors import UserError, shown
from sa_jax.formats.extras import read_json
from sa_jax.formats.sentencepiece_model import halves

LLAMA_3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The split pattern of Llama 3 and GLM-4, whose rank files do not contain one."""
_OLD_TEKKEN = """
  <unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG]
  <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]
""".split()
"""The default special tokens of a tekken.json that lists none, as in mistral_common."""
_MOST = 1 << 24
"""Maximum vocabulary size."""


def _letters() -> list[str]:
  printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LETTERS = _letters()
"""The character for each byte, as in GPT-2: the byte's own if printable, otherwise one from 256 on."""


def split_as(backend: tokenizers.Tokenizer, patterns: Sequence[str]) -> None:
  """Makes a tokenizer byte-level: sets its split patterns, byte encoding and decoder."""
  splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
  backend.decoder = decoders.ByteLevel()


def from_ranks(ranked: Sequence[bytes], pattern: str, special: Sequence[str] = ()) -> tokenizers.Tokenizer:
  """A tokenizer of byte strings.

  Args:
    ranked: the strings in order of rank.
    pattern: the split pattern.
    special: special tokens, which come first.
  """
  words = ["".join(LETTERS[byte] for byte in string) for string in ranked]
  vocabulary = {token: index for index, token in enumerate([*special, *words])}
  vocabulary |= {token: index for index, token in enumerate(special)}
  ranks = {word: rank for rank, word in enumerate(words)}
  lengths = set(map(len, words))
  merges = [
    pair
    for word in ranks
    for pair in sorted(
      ((left, right) for left, right in halves(word, lengths) if left in ranks and right in ranks),
      key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
    )
  ]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
  split_as(backend, [pattern])
  backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
  return backend


def read_tekken(file: Path) -> tokenizers.Tokenizer:
  """The tokenizer in a ``tekken.json``: special tokens, padded to the stated number, then byte strings.

  Raises:
    UserError: if the file is damaged.
  """
  values = read_json(file)
  config, vocabulary = values.get("config"), values.get("vocab")
  if not isinstance(config, dict) or not isinstance(config.get("pattern"), str) or not isinstance(vocabulary, list):
    raise UserError(f"{file} is not a tokenizer: it must have a config with a string 'pattern', and a list 'vocab'")
  size, count = (config.get(name) for name in ("default_vocab_size", "default_num_special_tokens"))
  for each in (size, count):
    if each is not None and not (isinstance(each, int) and 0 <= each <= _MOST):
      raise UserError(f"{file} is not a tokenizer: its config has the invalid size {shown(each)}")
  special = _OLD_TEKKEN if (listed := values.get("special_tokens")) is None else _in_order(listed, file)
  special = [*special, *(f"<SPECIAL_{number}>" for number in range(len(special), count or 0))]
  kept = vocabulary if size is None else vocabulary[: max(size - len(special), 0)]
  strings = [entry.get("token_bytes") if isinstance(entry, dict) else None for entry in kept]
  ranked = [_bytes(string, rank, file) for rank, string in enumerate(strings)]
  _check_once(ranked, file)
  try:
    return from_ranks(ranked, config["pattern"], special)
  except Exception as error:  # the tokenizers package raises bare Exception
    pattern = shown(config["pattern"])
    raise UserError(f"{file} is not a tokenizer: its pattern {pattern} is invalid: {error}") from None


def is_tiktoken(file: Path) -> bool:
  """Whether a file is a tiktoken rank list: each line a base64 string and its rank."""
  with file.open("rb") as opened:
    line = opened.readline(4096)
  word, _, rank = line.strip().partition(b" ")
  return bool(word) and rank.isdigit() and _decoded(word) is not None


def read_tiktoken(file: Path, listed: Mapping[int, tokenizers.AddedToken]) -> tokenizers.Tokenizer:
  """The tokenizer in a Llama 3 or GLM-4 tiktoken file.

  Args:
    file: the file.
    listed: the tokens that the settings list by id; gaps before and between them are filled.

  Raises:
    UserError: if the file is damaged.
  """
  ranked = []
  for number, line in enumerate(file.read_bytes().splitlines()):
    word, _, rank = line.partition(b" ")
    if rank.strip() != b"%d" % number:
      raise UserError(f"{file}, line {number + 1}: expected a base64 string and the rank {number}")
    ranked.append(_bytes(word, number, file))
  _check_once(ranked, file)
  backend = from_ranks(ranked, LLAMA_3_SPLIT)
  last = max(listed, default=-1)
  if last > _MOST:
    raise UserError(f"{file} has {len(ranked)} tokens, but the settings have one with id {last}")
  for number in range(len(ranked), last + 1):
    token = tokenizers.AddedToken(f"<|reserved_token_{number}|>", special=True, normalized=False)
    backend.add_tokens([listed.get(number, token)])
  return backend


def _in_order(listed: object, file: Path) -> list[str]:
  """Special tokens in order of rank, from 0."""
  entries = listed if isinstance(listed, list) else [None]
  found = [(each.get("rank"), each.get("token_str")) for each in entries if isinstance(each, dict)]
  by_rank = {rank: token for rank, token in found if isinstance(rank, int) and isinstance(token, str)}
  tokens = [by_rank[rank] for rank in range(len(entries)) if rank in by_rank]
  if len(set(tokens)) < len(entries):
    raise UserError(f"{file} is not a tokenizer: special_tokens are objects with 'rank' 0, 1, … and 'token_str'")
  return tokens


def _decoded(word: object) -> bytes | None:
  try:
    return base64.b64decode(word, validate=True) if isinstance(word, str | bytes) else None
  except (ValueError, binascii.Error):
    return None


def _bytes(word: object, rank: int, file: Path) -> bytes:
  if not (found := _decoded(word)):
    raise UserError(f"{file} is not a tokenizer: the string of rank {rank} is {shown(word)}, which is not base64")
  return found


def _check_once(ranked: Sequence[bytes], file: Path) -> None:
  faults = []
  if len(set(ranked)) < len(ranked):
    faults.append("some strings have two ranks")
  if len({string for string in ranked if len(string) == 1}) < 256:
    faults.append("some bytes have no rank")
  if faults:
    raise UserError.of(f"{file} is not a tokenizer", faults)
