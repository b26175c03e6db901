"""The chunked loss against the plain one: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax import ops

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 11, 6)).astype(np.float32)
KERNEL = RNG.normal(size=(6, 17)).astype(np.float32)
TOKENS = RNG.integers(0, 17, (2, 11)).astype(np.int32)
WEIGHTS = RNG.uniform(size=(2, 11)).astype(np.float32)


def chunked(hidden, kernel, tokens, weights, chunk):
  return ops.next_token_loss(lambda hidden: hidden @ kernel, hidden, tokens, weights, chunk=chunk)


def plain(hidden, kernel, weights):
  log_probs = jax.nn.log_softmax(hidden[:, :-1] @ kernel)
  chosen = jnp.take_along_axis(log_probs, jnp.asarray(TOKENS)[:, 1:, None], axis=-1)[..., 0]
  return -(chosen * weights[:, 1:]).sum()


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_value_and_gradient(chunk):
  loss = lambda hidden, kernel: chunked(hidden, kernel, jnp.asarray(TOKENS), jnp.asarray(WEIGHTS), chunk)[0]
  got = jax.value_and_grad(loss, argnums=(0, 1))(HIDDEN, KERNEL)
  want = jax.value_and_grad(plain, argnums=(0, 1))(HIDDEN, KERNEL, WEIGHTS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_logits_are_computed_once_and_the_gradient_scales():
  """Three products with the head's kernel: logits, and the gradients of both their factors."""
  loss = lambda hidden, kernel: 2.5 * chunked(hidden, kernel, jnp.asarray(TOKENS), jnp.asarray(WEIGHTS), 4)[0]
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  assert gradient.lower(HIDDEN, KERNEL).as_text().count("stablehlo.dot_general") == 3
  want = jax.grad(lambda *arrays: 2.5 * plain(*arrays), argnums=(0, 1))(HIDDEN, KERNEL, WEIGHTS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), gradient(HIDDEN, KERNEL), want)


def test_count_is_the_weight_of_what_is_predicted():
  total, count = chunked(jnp.asarray(HIDDEN), KERNEL, jnp.asarray(TOKENS), jnp.asarray(WEIGHTS), 4)
  np.testing.assert_allclose(count, WEIGHTS[:, 1:].sum(), rtol=1e-6)
  unweighted, tokens = chunked(jnp.asarray(HIDDEN), KERNEL, jnp.asarray(TOKENS), None, 4)
  assert tokens == 2 * 10
  assert total.dtype == unweighted.dtype == jnp.float32
  np.testing.assert_allclose(unweighted, plain(HIDDEN, KERNEL, np.ones_like(WEIGHTS)), rtol=1e-6)


def test_padding_may_be_no_token():
  """Weight 0 is none of the loss, and none of its gradient, whatever fills the padding."""
  weights = np.where(np.arange(11) < 7, WEIGHTS, 0).astype(np.float32)
  padded = np.where(weights > 0, TOKENS, -100)
  loss = lambda tokens: lambda hidden: chunked(hidden, KERNEL, jnp.asarray(tokens), jnp.asarray(weights), 4)[0]
  got, want = (jax.value_and_grad(loss(tokens))(jnp.asarray(HIDDEN)) for tokens in (padded, TOKENS))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3, None])
def test_z_loss(chunk):
  """Against optax, value and gradient: the squared log-normaliser, weighted."""

  def ours(hidden):
    head = lambda hidden: hidden @ KERNEL
    return ops.next_token_loss(head, hidden, jnp.asarray(TOKENS), jnp.asarray(WEIGHTS), z_loss=0.1, chunk=chunk)[0]

  def want(hidden):
    logits, targets = (hidden @ KERNEL)[:, :-1], jnp.asarray(TOKENS)[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return ((losses + 0.1 * jax.nn.logsumexp(logits, axis=-1) ** 2) * WEIGHTS[:, 1:]).sum()

  for got, expected in zip(jax.value_and_grad(ours)(HIDDEN), jax.value_and_grad(want)(HIDDEN)):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


TEACHER = RNG.normal(size=(2, 11, 5)).astype(np.float32)
TEACHER_KERNEL = RNG.normal(size=(5, 17)).astype(np.float32)


def distilled(hidden, kernel, teacher=TEACHER, chunk=None, **how):
  student = ops.Predictions(lambda hidden: hidden @ kernel, hidden)
  teacher = ops.Predictions(lambda hidden: hidden @ TEACHER_KERNEL, jnp.asarray(teacher))
  arrays = jnp.asarray(TOKENS), jnp.asarray(WEIGHTS)
  return ops.distillation_loss(student, teacher, *arrays, how=ops.Teaching(**how), chunk=chunk)[0]


@pytest.mark.parametrize(("temperature", "alpha", "chunk"), [(1.0, 1.0, 4), (2.5, 0.3, 11), (0.7, 0.0, None)])
def test_distillation(temperature, alpha, chunk):
  """The divergence by NumPy's formula in float64; the gradient by jax of optax's."""
  log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  student, teacher = (np.float64(h @ k)[:, :-1] for h, k in ((HIDDEN, KERNEL), (TEACHER, TEACHER_KERNEL)))
  p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
  entropies = -np.take_along_axis(log_softmax(student), TOKENS[:, 1:, None], -1)[..., 0]
  losses = (1 - alpha) * entropies + alpha * temperature**2 * (np.exp(p) * (p - q)).sum(-1)
  ours = lambda hidden, kernel: distilled(hidden, kernel, temperature=temperature, alpha=alpha, chunk=chunk)
  value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(HIDDEN, KERNEL)
  np.testing.assert_allclose(value, (losses * WEIGHTS[:, 1:]).sum(), rtol=1e-5)

  def by_optax(hidden, kernel):
    logits, targets = (hidden @ kernel)[:, :-1], jax.nn.softmax((TEACHER @ TEACHER_KERNEL)[:, :-1] / temperature)
    divergence = optax.losses.kl_divergence(jax.nn.log_softmax(logits / temperature), targets)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(TOKENS)[:, 1:])
    return (((1 - alpha) * entropy + alpha * temperature**2 * divergence) * WEIGHTS[:, 1:]).sum()

  for got, want in zip(gradients, jax.jit(jax.grad(by_optax, argnums=(0, 1)))(HIDDEN, KERNEL)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_teacher_gets_no_gradient():
  assert not jax.grad(lambda teacher: distilled(jnp.asarray(HIDDEN), KERNEL, teacher))(TEACHER).any()


def test_distillation_refuses():
  for how in ({"temperature": 0.0}, {"alpha": 1.5}):
    with pytest.raises(ValueError, match="temperature must be positive and alpha 0 to 1"):
      distilled(jnp.asarray(HIDDEN), KERNEL, **how)
  with pytest.raises(ValueError, match=r"the same tokens, not \(2, 7\) and \(2, 11\)"):
    distilled(jnp.asarray(HIDDEN), KERNEL, TEACHER[:, :7])


@pytest.mark.parametrize("teach", [False, True])
def test_temporaries_do_not_grow_with_the_vocabulary(monkeypatch, teach):
  """When the caller does not choose the chunk, it is the shorter the larger the vocabulary."""
  monkeypatch.setattr("sa_jax.ops.loss._LOGITS", 2**16)
  length, embed = 1024, 2
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)

  def loss(hidden, kernel, teacher, tokens):
    head = lambda kernel: lambda hidden: hidden @ kernel
    if teach:
      student, taught = (ops.Predictions(head(each), hidden) for each in (kernel, teacher))
      return ops.distillation_loss(student, taught, tokens, how=ops.Teaching(alpha=0.5))[0]
    return ops.next_token_loss(head(kernel), hidden, tokens)[0]

  def temporaries(vocab):
    arrays = shape(1, length, embed), shape(embed, vocab), shape(embed, vocab)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays, jax.ShapeDtypeStruct((1, length), jnp.int32))
    return compiled.compile().memory_analysis().temp_size_in_bytes

  small, large = temporaries(2**10), temporaries(2**14)
  # The kernel's own gradient is added up over chunks; the logits would take 60 MB more.
  assert large - small <= 4 * (2**14 - 2**10) * embed * 4
  assert large < length * 2**14 * 4 / 16


def test_memory_is_that_of_one_chunk():
  length, vocab, chunk = 1024, 2048, 64
  hidden, tokens = jax.ShapeDtypeStruct((1, length, 8), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
  kernel = jax.ShapeDtypeStruct((8, vocab), jnp.float32)

  def temporaries(chunk):
    loss = lambda hidden, kernel, tokens: chunked(hidden, kernel, tokens, None, chunk)[0]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, kernel, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = length * vocab * 4
  assert temporaries(length) > logits
  assert temporaries(chunk) < logits / 4


@pytest.mark.parametrize(
  ("tokens", "weights", "chunk", "message"),
  [
    (TOKENS[:, :5], None, 4, r"not \(2, 11, 6\), \(2, 5\)"),
    (TOKENS, WEIGHTS[:, :5], 4, r"\(2, 11\), \(2, 5\)"),
    (TOKENS, None, 0, "chunk must be at least 1 position, not 0"),
  ],
)
def test_what_does_not_fit_is_named(tokens, weights, chunk, message):
  with pytest.raises(ValueError, match=message):
    chunked(jnp.asarray(HIDDEN), KERNEL, tokens, weights, chunk)
