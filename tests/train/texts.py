"""Texts, chats and a tokenizer for the tests of training data."""

import json

import numpy as np

from sa_jax import Tokenizer
from sa_jax.train import data
from sa_jax.train.data import Corpus, Report

CHATML = (
  "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
  "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
  "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


MESSAGES = [
  {"role": "user", "content": "Hi there"},
  {"role": "assistant", "content": "Hello, naïve 🙂 one"},
  {"role": "user", "content": "And?"},
  {"role": "assistant", "content": "That is\nall."},
]


END = 256


def chat_tokenizer() -> Tokenizer:
  backend = data.byte_tokenizer().backend
  backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  return Tokenizer(backend, CHATML, (("eos_token", "<|im_end|>"),))


def write(path, *lines) -> object:
  path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
  return path


def corpus_of(*lengths, prompts=None) -> Corpus:
  """Documents of these lengths, their tokens numbered on; of samples, the first ``prompts`` tokens are only read."""
  total = sum(lengths)
  offsets = np.cumsum([0, *lengths])
  trained = np.ones(total, bool)
  for start, prompt in zip(offsets, prompts or []):
    trained[start : start + prompt] = False
  return Corpus(np.arange(total, dtype=np.uint32), trained, offsets, Report())


def texts(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
  """Each document, what is learnt in brackets."""
  out = []
  for start, stop in zip(corpus.offsets[:-1], corpus.offsets[1:]):
    parts, marks = corpus.tokens[start:stop], corpus.trained[start:stop]
    text = ""
    for cut in np.split(np.arange(stop - start), np.flatnonzero(np.diff(marks)) + 1):
      piece = tokenizer.decode(parts[cut], special=True)
      text += f"[{piece}]" if marks[cut[0]] else piece
    out.append(text)
  return out
