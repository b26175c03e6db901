"""SentencePiece's BPE as a `tokenizers` object, from a ``tokenizer.model`` or the pieces in a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, normalizers

from sa_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Piece types. The last two are matched as whole tokens."""

_SPACE = "▁"
"""SentencePiece's space symbol."""
_BPE = 2
"""SentencePiece's model type for BPE."""


class Pieces(NamedTuple):
  """A vocabulary.

  Attributes:
    tokens: the pieces.
    scores: their scores; neighbours are merged in order of the merged piece's score, highest first.
    kinds: their types.
    space_before: whether a space is added before a text.
  """

  tokens: Sequence[str]
  scores: Sequence[float]
  kinds: Sequence[int]
  space_before: bool


def read_pieces(file: Path) -> Pieces:
  """The vocabulary in a ``tokenizer.model``.

  Raises:
    UserError: if the file is damaged, is not BPE, or normalises its text.
  """
  try:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto
  except ImportError as error:
    raise UserError(
      f"reading {file} needs the sentencepiece and protobuf packages ({error}): pip install 'sa-jax[sentencepiece]'"
    ) from None
  model = proto.ModelProto()  # type: ignore[attr-defined]  # the module is generated at import
  try:
    model.ParseFromString(file.read_bytes())
  except (DecodeError, OSError) as error:
    raise UserError(f"{file} is not a SentencePiece model: {error}") from None
  rules = model.normalizer_spec
  faults = [
    reason
    for wrong, reason in (
      (not model.pieces, "it has no pieces"),
      (model.trainer_spec.model_type != _BPE, "it is not BPE, the only supported type"),
      (bool(rules.precompiled_charsmap), f"it rewrites characters ({rules.name}), which is not implemented"),
      (rules.remove_extra_whitespaces, "it removes spaces, which is not implemented"),
    )
    if wrong
  ]
  if faults:
    raise UserError.of(f"{file} cannot be used; the model's tokenizer.json can", faults)
  columns = zip(*((piece.piece, piece.score, piece.type) for piece in model.pieces), strict=True)
  tokens, scores, kinds = columns
  return Pieces(tokens, scores, kinds, rules.add_dummy_prefix)


def backend_of(pieces: Pieces) -> tokenizers.Tokenizer:
  """BPE over characters with byte fallback: SentencePiece's, as in Llama 2 and Mistral.

  SentencePiece merges the neighbours whose piece has the highest score (Kudo & Richardson, arXiv 1808.06226), so the
  merges are all splits of a piece into two pieces, ordered by the piece's score.
  """
  tokens, scores, kinds, space_before = pieces
  vocabulary = {token: index for index, token in enumerate(tokens)}
  score_of = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == NORMAL}
  lengths = set(map(len, score_of))
  merges = [
    (left, right)
    for piece in sorted(score_of, key=lambda piece: -score_of[piece])
    for left, right in halves(piece, lengths)
    if left in score_of and right in score_of
  ]
  unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
  )
  spaces = [normalizers.Prepend(_SPACE)] * space_before + [normalizers.Replace(" ", _SPACE)]
  backend.normalizer = normalizers.Sequence(spaces)
  strip = [decoders.Strip(" ", 1, 0)] * space_before
  backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
  add_whole(backend, tokens, kinds)
  return backend


def add_whole(backend: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
  """Adds the tokens that are matched as a whole."""
  whole = {CONTROL: True, USER_DEFINED: False}
  backend.add_tokens(
    [
      tokenizers.AddedToken(token, special=whole[kind], normalized=False)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind in whole
    ]
  )


def put_around(backend: tokenizers.Tokenizer, before: Sequence[str], after: Sequence[str]) -> None:
  """Adds tokens before and after every text."""
  if before or after:
    special = [(token, backend.token_to_id(token)) for token in (*before, *after)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=" ".join([*before, "$A", *after]), special_tokens=special
    )


def halves(piece: str, lengths: set[int]) -> list[tuple[str, str]]:
  """The splits of a piece into two halves with lengths of existing pieces, shorter left half first.

  All splits of a piece of 100,000 characters would take 10 GB; few other pieces are as long as its halves.
  """
  size = len(piece)
  cuts = range(1, size) if size <= len(lengths) else sorted(cut for cut in lengths if cut < size)
  return [(piece[:cut], piece[cut:]) for cut in cuts if size - cut in lengths]
