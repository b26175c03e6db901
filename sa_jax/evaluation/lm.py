"""An sa_jax model with the interface of EleutherAI's lm-eval."""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from sa_jax.decode import Batcher, Sampler, Serving, capacity_for, pad_to
from sa_jax.display import Progress
from sa_jax.distributed import check_given, is_multiprocess
from sa_jax.errors import UserError
from sa_jax.evaluation.answers import Answers, Request
from sa_jax.evaluation.scoring import Scorer, part, together
from sa_jax.evaluation.settings import Limits
from sa_jax.formats.tokenizer import Tokenizer
from sa_jax.nn import Transformer
from sa_jax.params import as_layers
from sa_jax.trees import Params

T = TypeVar("T")

_ENCODED_AT_ONCE = 4096
"""Texts per call, enough for all threads of the tokenizer."""


_WITHOUT_EFFECT = {
  "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
  "diversity_penalty": 0.0, "encoder_repetition_penalty": 1.0, "typical_p": 1.0, "min_p": 0.0, "epsilon_cutoff": 0.0,
  "eta_cutoff": 0.0, "min_length": 0, "min_new_tokens": 0, "penalty_alpha": 0.0,
}  # fmt: skip
"""Values of transformers' settings that have no effect."""
_OF_SAMPLING = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("length_penalty", "early_stopping", "use_cache")
"""Settings without effect for a single beam, at any value."""
_LOG = logging.getLogger(__name__)


class SharedAttentionLM(TemplateLM):
  """An sa_jax model for ``lm_eval.simple_evaluate(model=...)``, without torch.

  Each process of a multi-host run gets all requests, works on its part of them, and returns all answers.

  Attributes:
    tokenizer: the model's.
    name: the tokenizer's name in lm-eval's caches.
    max_length: maximum number of tokens; longer requests are truncated at the start.
    slots: concurrent generations.
  """

  tokenizer: Tokenizer

  def __init__(
    self,
    model: Transformer,
    params: Params | Callable[[], Params],
    tokenizer: Tokenizer,
    *,
    limits: Limits = Limits(),
    answers: Answers | None = None,
    name: str = "sa_jax",
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
  ):
    """Creates the adapter.

    Args:
      model: from `sa_jax.from_pretrained`.
      params: in the layer layout; the run layout takes a second copy of the weights. Or a function that reads them,
        called with the first request that has no stored answer.
      tokenizer: from `sa_jax.load_tokenizer`.
      limits: batch sizes and length limits.
      answers: stored answers to reuse and extend; None for none.
      name: see `tokenizer_name`.
      progress: from a label to a context manager that yields a progress callback; None for lm-eval's progress bars, in
        terminals.

    Raises:
      UserError: if the model has no end token.
    """
    super().__init__()
    self._model, self._read, self._batch_tokens, self._answers = model, params, limits.batch_tokens, answers
    self.tokenizer, self.name, self.slots = tokenizer, name, limits.slots
    self.max_length = limits.max_length or model.config.max_length
    self._max_new_tokens, self._progress = limits.max_new_tokens, progress or _bar
    special = {key: tokenizer.backend.token_to_id(token) for key, token in tokenizer.special}
    ends = model.config.eos_token_ids
    end = special.get("eos_token", ends[0] if ends else None)
    if end is None:
      raise UserError("neither the config nor the tokenizer defines an end token, which lm-eval needs")
    start = special.get("bos_token", model.config.bos_token_id)
    self._end, self._start = int(end), int(end if start is None else start)
    self._start_text = tokenizer.decode([self._start], special=True)
    self._encoded: dict[str, list[int]] = {}

  @functools.cached_property
  def _params(self) -> Params:
    return as_layers(self._read() if callable(self._read) else self._read, self._model.plan)

  @functools.cached_property
  def _scorer(self) -> Scorer:
    return Scorer(self._model, self._params, batch_tokens=self._batch_tokens)

  def _shown(self, label: str, disable: bool) -> AbstractContextManager[Progress]:
    return _nothing() if disable else self._progress(label)

  def _answered(self, kind: str, requests: list[Instance], work: Callable[[list[Instance]], list[T]]) -> list[T]:
    """Stored answers, and new answers to the other requests, task by task."""
    if self._answers is None:
      return work(requests)
    asked = [Request(kind, request.args, request.task_name) for request in requests]
    return self._answers.answer(asked, lambda numbers: work([requests[number] for number in numbers]))

  @property
  def eot_token_id(self) -> int:
    """The end token."""
    return self._end

  @property
  def prefix_token_id(self) -> int:
    """The context used for an empty one: the start token, or the end token if there is none."""
    return self._start

  @property
  def tokenizer_name(self) -> str:
    """The tokenizer's name in lm-eval's caches."""
    return self.name

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Token ids; by default with a start token, if the tokenizer adds one and the text does not contain it."""
    if add_special_tokens is None:
      if (known := self._encoded.get(string)) is not None:
        return known
      add_special_tokens = not string.startswith(self._start_text)
    return self.tokenizer.encode(string, special=add_special_tokens)

  def _encode_ahead(self, texts: Iterable[str]) -> None:
    """Encodes texts with all threads, for `tok_encode` to look up."""
    wanted = [text for text in dict.fromkeys(texts) if text and not text.startswith(self._start_text)]
    encoded = self.tokenizer.backend.encode_batch_fast(wanted)
    self._encoded = {text: each.ids for text, each in zip(wanted, encoded, strict=True)}

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Messages as text; without ``add_generation_prompt`` the last message stays open, to be continued."""
    template = self.tokenizer.template
    write = template.continued if not add_generation_prompt else self.tokenizer.chat
    try:
      return write(chat_history)
    except UserError as error:
      others = [message for message in chat_history if message["role"] != "system"]
      if len(others) == len(chat_history):
        raise
      _LOG.warning("%s; the request is sent without the system message", error)
      return write(others)

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Log-likelihood of each request's continuation given its context, and whether greedy decoding gives it."""
    return self._answered("loglikelihood", requests, lambda asked: self._log_likelihoods(asked, disable_tqdm))

  def _log_likelihoods(self, requests: list[Instance], disable_tqdm: bool) -> list[tuple[float, bool]]:
    pairs: list[tuple[tuple[str, str], list[int], list[int]]] = []
    for begin in range(0, len(requests), _ENCODED_AT_ONCE):
      block = [request.args for request in requests[begin : begin + _ENCODED_AT_ONCE]]
      self._encode_ahead(text for args in block for text in (args[0].rstrip(), args[0] + args[1]))
      pairs += [(args, *self._pair(*args)) for args in block]
    self._encoded = {}
    return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

  def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and its continuation; neither is empty."""
    if context:
      return self._encode_pair(context, continuation)
    tokens = self.tok_encode(continuation, add_special_tokens=False)
    return (tokens[:1], tokens[1:]) if tokens[:1] == [self._start] else ([self._start], tokens)

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = False, **_: Any
  ) -> list[tuple[float, bool]]:
    # An empty continuation has probability 1 and is greedy.
    answers = [(0.0, True)] * len(requests)
    asked = [number for number, (_, _, continuation) in enumerate(requests) if continuation]
    pairs = [self._truncated(*requests[number][1:]) for number in asked]
    if not asked:
      return answers
    score = self._scorer  # may read the weights, with its own progress
    with self._shown("scoring", disable_tqdm) as report:
      for number, scored in zip(asked, score(pairs, report), strict=True):
        answers[number] = scored.log_likelihood, scored.greedy
    return answers

  def _truncated(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Truncates a request's context at the start if it is too long; the continuation stays complete."""
    if len(continuation) > self.max_length:
      raise UserError(
        f"a continuation of {len(continuation)} tokens is longer than the model's context of {self.max_length}"
      )
    return context[-(self.max_length + 1 - len(continuation)) :], continuation

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood of each request's whole text, in windows of ``max_length`` tokens that predict each token once.

    If the tokenizer adds tokens before a text, every window begins with them.
    """
    return self._answered("loglikelihood_rolling", requests, lambda asked: self._rolling(asked, disable_tqdm))

  def _rolling(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
    windows: list[tuple[int, list[int], list[int]]] = []
    opening = self.tokenizer.opening()
    for number, request in enumerate(requests):
      rolling = utils.get_rolling_token_windows(
        self.tok_encode(request.args[0], add_special_tokens=False),
        opening[-1] if opening else self.prefix_token_id,
        self.max_length - len(opening),
        context_len=1,
      )
      for at, window in enumerate(rolling):
        context, continuation = utils.make_disjoint_window(window)
        # The first window's context is the last opening token, a later one's the previous token.
        windows.append((number, (opening if at else opening[:-1]) + context, continuation))
    scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
    totals = [0.0] * len(requests)
    for (number, *_), (value, _) in zip(windows, scores, strict=True):
      totals[number] += value
    return totals

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Continues each context up to its first stop string, the end token or its maximum length."""
    return self._answered("generate_until", requests, lambda asked: self._generate_all(asked, disable_tqdm))

  def _generate_all(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
    by_settings: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
    texts = [""] * len(requests)
    for settings, numbers in by_settings.items():
      contexts = [requests[number].args[0] for number in numbers]
      for number, text in zip(numbers, self._generate(contexts, json.loads(settings), disable_tqdm), strict=True):
        texts[number] = text
    return texts

  def _generate(self, contexts: Sequence[str], settings: dict[str, Any], disable_tqdm: bool) -> list[str]:
    stops, longest, sampler = self._read_settings(settings)
    if longest >= self.max_length:
      raise UserError(f"{longest} new tokens leave no room for a prompt in the model's context of {self.max_length}")
    check_given("generation", {"contexts": contexts, "settings": settings, "slots": self.slots})
    self._encode_ahead(contexts)
    prompts = [self.tok_encode(context)[-(self.max_length - longest) :] or [self._start] for context in contexts]
    self._encoded = {}
    # If the model spans processes, all of them run it together.
    spread = is_multiprocess(self._params)
    mine = range(len(prompts)) if spread else part(range(len(prompts)), jax.process_index(), jax.process_count())
    # One capacity for all prompts, so that every process compiles the same programs.
    needed = max(map(len, prompts)) + longest - 1
    batcher = Batcher(
      self._model,
      self._params,
      Serving(slots=min(self.slots, pad_to(len(mine), self.slots)), capacity=capacity_for(needed)),
      sampler=sampler,
    )
    running = {number: batcher.submit(prompts[number], longest, row=number) for number in mine}
    with self._shown("generating", disable_tqdm) as report:
      while batcher.busy:
        batcher.step()
        for request in running.values():
          if request.status == "running" and self._stopped(request.tokens, batcher.how.chunk + 1, stops):
            batcher.cancel(request)
        report(sum(request.status in ("done", "cancelled") for request in running.values()), len(running))
    tokens = np.zeros((len(prompts), longest + 1), np.int64)
    for number, request in running.items():
      tokens[number, : len(request.tokens)] = request.tokens
      tokens[number, longest] = len(request.tokens)
    if not spread:
      (tokens,) = together((tokens,))
    rows = (self._until(row[: row[longest]], stops) for row in tokens.tolist())
    return [postprocess_generated_text(self.tokenizer.decode(row), stops, None) for row in rows]

  def _until(self, tokens: Sequence[int], stops: Sequence[str]) -> Sequence[int]:
    """The tokens up to the one that completes a stop string; special tokens are text here, but not in the answer."""

    def stopped(count: int) -> bool:
      text = self.tokenizer.decode(tokens[:count], special=True)
      return any(stop in text for stop in stops)

    return tokens[: bisect.bisect_left(range(len(tokens)), True, key=stopped)]

  def _stopped(self, tokens: Sequence[int], new: int, stops: Sequence[str]) -> bool:
    """Whether a stop string ends within the last ``new`` tokens; it has at most as many tokens as bytes."""
    text = self.tokenizer.decode(tokens[-new - max(len(stop.encode()) for stop in stops) :], special=True)
    return any(stop in text for stop in stops)

  def _read_settings(self, settings: dict[str, Any]) -> tuple[list[str], int, Sampler]:
    """Stop strings, maximum number of new tokens, and the sampler from lm-eval's ``generation_kwargs``."""
    known = dict(normalize_gen_kwargs(settings, self._max_new_tokens))
    end = self.tokenizer.decode([self._end], special=True)
    stops = [stop for stop in handle_stop_sequences(known.pop("until", None), end) if stop]
    longest = int(known.pop("max_gen_toks"))
    temperature = float(known.pop("temperature", 0.0))
    sampling = bool(known.pop("do_sample", False)) and temperature > 0
    filters = {name: known.pop(name, None) for name in ("top_k", "top_p")}
    unknown = [
      name
      for name, value in known.items()
      if not (value is None or name in _OF_BEAMS or _WITHOUT_EFFECT.get(name) == value)
      and not (name in _OF_SAMPLING and not sampling)
    ]
    if unknown:
      raise UserError(
        f"the task uses unsupported generation settings: {', '.join(sorted(unknown))}; supported are "
        "until, max_gen_toks, do_sample, temperature, top_k and top_p"
      )
    return stops, longest, Sampler(temperature, **filters) if sampling else Sampler()


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Progress]:
  """lm-eval's kind of progress bar, if there is a terminal."""
  with tqdm(desc=label, disable=not sys.stderr.isatty() or jax.process_index() > 0) as bar:

    def report(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    yield report


@contextlib.contextmanager
def _nothing() -> Iterator[Progress]:
  yield lambda done, total: None
