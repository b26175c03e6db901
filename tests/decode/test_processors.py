"""Rules about the next token: against transformers' own on the same logits, and by their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import decode
from sa_jax.decode import Sampler, Start
from tests import tiny

VOCAB = 20
ROWS = [[3, 3, 7], [11, 2], [5]]
LOGITS = np.random.default_rng(0).normal(scale=2.0, size=(3, VOCAB)).astype(np.float32)
SAID = np.array([[7, 1], [4, 4], [0, 9]], np.int32)
"""Two new tokens of each row."""


def start():
  tokens, lengths = decode.right_pad(ROWS, pad=1)
  return Start(jnp.asarray(tokens), jnp.asarray(lengths), 8, VOCAB)


def after_two(sampler, logits=LOGITS):
  """Processed logits once the two new tokens of each row have been drawn."""
  history = sampler.begin(start())
  for step in range(2):
    history = sampler.after(history, jnp.asarray(SAID[:, step]))
  return np.asarray(jax.jit(Sampler.processed)(sampler, jnp.asarray(logits), history))


def theirs(processors, prompts: bool = True):
  """What transformers makes of the same logits after the same tokens, row by row."""
  torch = pytest.importorskip("torch")
  out = []
  for row, prompt in enumerate(ROWS):
    said = torch.tensor([[*(prompt if prompts else []), *SAID[row]]])
    scores = torch.tensor(LOGITS[row : row + 1])
    for processor in processors:
      scores = processor(said, scores)
    out.append(scores[0].numpy())
  return np.stack(out)


def test_repetition_penalty_is_theirs():
  transformers = pytest.importorskip("transformers")
  found = after_two(Sampler(processors=(decode.RepetitionPenalty(1.7),)))
  np.testing.assert_allclose(found, theirs([transformers.RepetitionPenaltyLogitsProcessor(1.7)]), rtol=1e-6)
  assert (found != LOGITS).sum() == 3 + 3 + 3  # the different tokens of each row


def test_bans_are_theirs():
  transformers = pytest.importorskip("transformers")
  processors = (decode.Ban([2, 9]), decode.Bias([4, 6], [1.5, -2.0]))
  own = [
    transformers.SuppressTokensLogitsProcessor([2, 9]),
    transformers.SequenceBiasLogitsProcessor({(4,): 1.5, (6,): -2.0}),
  ]
  np.testing.assert_allclose(after_two(Sampler(processors=processors)), theirs(own), rtol=1e-6)


@pytest.mark.parametrize("least", [2, 3])
def test_not_before_is_theirs(least):
  transformers = pytest.importorskip("transformers")
  own = transformers.MinLengthLogitsProcessor(least, eos_token_id=[5, 8], device="cpu")
  found = after_two(Sampler(processors=(decode.NotBefore([5, 8], least),)))
  np.testing.assert_array_equal(found, theirs([own], prompts=False))
  assert np.isinf(found[:, [5, 8]]).all() == (least > 2)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_the_whole_chain_is_theirs(min_p):
  """Penalty, temperature, top-k, top-p, min-p, in that order."""
  transformers = pytest.importorskip("transformers")
  sampler = Sampler(0.8, top_k=12, top_p=0.9, min_p=min_p, processors=(decode.RepetitionPenalty(1.3),))
  own = [
    transformers.RepetitionPenaltyLogitsProcessor(1.3),
    transformers.TemperatureLogitsWarper(0.8),
    transformers.TopKLogitsWarper(12),
    transformers.TopPLogitsWarper(0.9),
    transformers.MinPLogitsWarper(min_p),
  ]
  wanted = theirs(own)
  found = np.asarray(sampler.filter(after_two(sampler)))
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  if min_p == 1:
    assert (np.isfinite(found).sum(axis=1) == 1).all()


def test_penalties_of_counts_by_their_formula():
  found = after_two(Sampler(processors=(decode.CountPenalty(frequency=0.5, presence=0.25),)))
  wanted = LOGITS.copy()
  for row, tokens in enumerate(SAID):
    for token in tokens:
      wanted[row, token] -= 0.5
    for token in set(tokens.tolist()):
      wanted[row, token] -= 0.25
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_allowed_tokens_alone_remain():
  found = after_two(Sampler(processors=(decode.Allow([1, 4]),)))
  np.testing.assert_array_equal(np.flatnonzero(np.isfinite(found[0])), [1, 4])
  np.testing.assert_array_equal(found[:, [1, 4]], LOGITS[:, [1, 4]])


def test_probabilities_are_what_is_drawn_by():
  sampler = Sampler(0.9, min_p=0.1)
  filtered = np.where(LOGITS.max(1, keepdims=True) / 0.9 + np.log(0.1) > LOGITS / 0.9, -np.inf, LOGITS / 0.9)
  wanted = np.exp(filtered) / np.exp(filtered).sum(1, keepdims=True)
  np.testing.assert_allclose(sampler.probabilities(LOGITS), wanted, rtol=1e-5)
  np.testing.assert_array_equal(Sampler().probabilities(LOGITS).argmax(1), LOGITS.argmax(1))
  assert float(Sampler().probabilities(LOGITS).sum()) == 3


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1", num_layers=2, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def run(model, params):
  return functools.partial(sa_jax.generate, model, params, *decode.right_pad(ROWS), max_new_tokens=7)


class TestInTheLoop:
  """Rules keep their states through the token loop, and through rows that come and go."""

  def test_a_large_penalty_repeats_nothing(self, run):
    plain = run().tokens
    assert any(len(set(row.tolist())) < 7 for row in plain)
    sampler = Sampler(processors=(decode.CountPenalty(presence=1e4),))
    once, few = run(sampler=sampler).tokens, run(sampler=sampler, slots=2).tokens
    assert all(len(set(row.tolist())) == 7 for row in once)
    np.testing.assert_array_equal(once, few)

  def test_the_prompt_counts_as_said(self, run):
    found = run(sampler=Sampler(processors=(decode.RepetitionPenalty(1e9), decode.Ban([0])))).tokens
    # Positive logits vanish and negative ones sink: what has been said comes last.
    for row, prompt in zip(found.tolist(), ROWS):
      assert not set(row) & {0}
      assert len(set(row)) == 7
      assert not set(row) & set(prompt)

  @pytest.mark.parametrize("slots", [64, 2])
  def test_an_automaton_and_the_host_agree(self, run, slots):
    """A number, a comma, a number, a comma: tokens 10 to 19 and token 1 in turn; and never the same number again."""
    number = np.arange(VOCAB) >= 10
    comma = np.arange(VOCAB) == 1
    automaton = decode.Automaton(np.stack([number, comma]), np.array([[1] * VOCAB, [0] * VOCAB]))

    def grammar(prompt, new):
      assert prompt.tolist() in ROWS
      return comma if len(new) % 2 else number & ~np.isin(np.arange(VOCAB), new)

    device = run(sampler=Sampler(processors=(automaton,)), slots=slots).tokens
    assert (device[:, 0::2] >= 10).all()
    assert (device[:, 1::2] == 1).all()
    host = run(sampler=Sampler(processors=(decode.HostMask(grammar),)), slots=slots).tokens
    both = run(sampler=Sampler(processors=(automaton, decode.CountPenalty(presence=0.0))), slots=slots).tokens
    np.testing.assert_array_equal(both, device)
    np.testing.assert_array_equal(host[:, :2], device[:, :2])
    assert all(len(set(row[::2].tolist())) == 4 for row in host)

  def test_log_probabilities_are_the_models(self, model, params, run):
    out = run(sampler=Sampler(1.0, log_probs=True, processors=(decode.Ban([4]),)), seed=1)
    assert run().log_probs is None
    for row, prompt in enumerate(ROWS):
      whole = np.concatenate([prompt, out.tokens[row]])[None]
      logits = np.asarray(jax.jit(model.apply)({"params": params}, whole), np.float64)[0]
      wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      at = np.arange(len(prompt) - 1, whole.shape[1] - 1)
      np.testing.assert_allclose(out.log_probs[row], wanted[at, whole[0, 1:][at]], atol=1e-5)
    few = run(sampler=Sampler(1.0, log_probs=True, processors=(decode.Ban([4]),)), seed=1, slots=2)
    np.testing.assert_allclose(few.log_probs, out.log_probs, atol=1e-5)


@pytest.mark.parametrize(
  ("processor", "message"),
  [
    (lambda: decode.RepetitionPenalty(0.0), "a repetition penalty must be positive and finite, not 0.0"),
    (lambda: decode.Ban([3, 20]), r"Ban has invalid tokens \[20\]; the vocabulary is 0 to 19"),
    (lambda: decode.Automaton(np.ones((1, 5), bool), np.zeros((1, 5), int)), "with a vocabulary of 20"),
    (
      lambda: decode.Automaton(np.ones((2, VOCAB), bool), np.full((2, VOCAB), 7), first=9),
      r"an automaton of 2 states has no states \[7, 9\]: they are 0 to 1",
    ),
    (
      lambda: decode.Automaton(np.zeros((1, VOCAB), bool), np.zeros((1, VOCAB), int)),
      r"states \[0\] of the automaton allow no token",
    ),
  ],
)
def test_refused(run, processor, message):
  with pytest.raises(sa_jax.UserError, match=message):
    run(sampler=Sampler(processors=(processor(),)))


def test_a_sampler_or_its_parts(run):
  with pytest.raises(sa_jax.UserError, match="give a sampler or a temperature, not both"):
    run(sampler=Sampler(), temperature=0.5)
  with pytest.raises(sa_jax.UserError, match=r"min_p=2 \(must be 0 to 1\)"):
    Sampler(1.0, min_p=2)
