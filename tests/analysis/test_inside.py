"""What is seen in a model, and what changes there, against a recomputation layer by layer in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.analysis import Edit, ablate, logit_lens, look, patch, steer
from sa_jax.nn import BLOCK_OUTPUTS
from tests import tiny

PLAN = "1:2-3,4:5"
LAYERS = 6
SITES = ("residual", "weights", "values", "heads", "attention", "mlp")


@pytest.fixture(scope="module")
def model():
  return tiny.model(PLAN, num_layers=LAYERS)


@pytest.fixture(scope="module", params=["layers", "runs"])
def params(model, request):
  return jax.tree.map(jnp.asarray, tiny.params(model, request.param))


@pytest.fixture(scope="module")
def tokens():
  return tiny.tokens(2, 6)


def plainly(model, params, tokens, change=lambda site, layer, x: x, segments=None):
  """Logits and everything that is to be seen, in float64; ``change`` may change each."""
  config = model.config
  whole = params if "layers" in params else sa_jax.unstack(params, model.plan)
  whole = jax.tree.map(lambda x: np.asarray(x, np.float64), whole)
  seen = {site: [] for site in SITES}

  def at(site, layer, x):
    seen[site].append(change(site, layer, x))
    return seen[site][-1]

  norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale
  length = tokens.shape[1]
  hidden = np.arange(length)[:, None] < np.arange(length)[None]
  if segments is not None:
    hidden = hidden | (segments[:, None, :, None] != segments[:, None, None, :])
  frequencies = ops.rope_frequencies(config.rope, config.head_dim, length)
  rotate = lambda x: np.asarray(
    ops.apply_rope(jnp.asarray(x, jnp.float32), jnp.arange(length), frequencies), np.float64
  )
  x = whole["embed"]["embedding"][tokens]
  for number in range(LAYERS):
    layer = whole["layers"][str(number)]
    x = at("residual", number, x)
    h = norm(x, layer["attention_norm"]["scale"])
    project = lambda name: np.einsum("BTD,DNH->BTNH", h, layer["attention"][name]["kernel"])
    if "q_proj" in layer["attention"]:
      q, k = rotate(project("q_proj")), np.repeat(rotate(project("k_proj")), 2, axis=2)
      scores = np.where(hidden, -np.inf, np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(config.head_dim))
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights = shared = at("weights", number, weights / weights.sum(-1, keepdims=True))
    else:
      weights = at("weights", number, shared)  # each follower has its anchor's, whatever another one changes
    values = np.repeat(at("values", number, project("v_proj")), 2, axis=2)
    heads = at("heads", number, np.einsum("BNTS,BSNH->BTNH", weights, values))
    x = x + at("attention", number, np.einsum("BTNH,NHD->BTD", heads, layer["attention"]["o_proj"]["kernel"]))
    h = norm(x, layer["mlp_norm"]["scale"])
    gate, up = (h @ layer["mlp"][name]["kernel"] for name in ("gate_proj", "up_proj"))
    x = x + at("mlp", number, (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"])
  x = at("residual", LAYERS, x)
  return norm(x, whole["final_norm"]["scale"]) @ whole["lm_head"]["kernel"], seen


def assert_close(found, wanted):
  np.testing.assert_allclose(found, wanted, atol=2e-4 * max(1, np.abs(wanted).max()))


def test_everything_is_seen_by_layer_number(model, params, tokens):
  logits, wanted = plainly(model, params, tokens)
  found = look(model, params, tokens, capture=(*SITES, "states"))
  assert_close(found.logits, logits)
  np.testing.assert_allclose(found.logits, model.apply({"params": params}, tokens), atol=1e-5)
  for site in SITES:
    assert len(found.seen[site]) == len(wanted[site])
    for ours, theirs in zip(found.seen[site], wanted[site]):
      assert_close(ours, theirs)
  for state, weights in zip(found.seen["states"], wanted["weights"], strict=True):
    assert_close(state.weights(), weights)
  np.testing.assert_array_equal(found.seen["weights"][1], found.seen["weights"][3])


CHANGES = {
  "heads": (ablate("heads", 3, heads=[0, 2]), lambda x: x * np.array([0, 1, 0, 1])[:, None]),
  "values": (ablate("values", 1, heads=1, positions=[0, 4]), lambda x: x * _but(x, np.s_[:, [0, 4], 1])),
  "residual": (steer("residual", 2, np.arange(32.0)), lambda x: x + np.arange(32.0)),
  "the last": (ablate("residual", LAYERS, positions=5), lambda x: x * _but(x, np.s_[:, 5])),
  "attention": (Edit("attention", 4, 1.0, 0.5), lambda x: 0.5 * x + 1),
  "mlp": (patch("mlp", 0, np.ones((2, 6, 32))), np.ones_like),
  # An anchor's weights are its followers' too.
  "weights": (
    patch("weights", 1, np.eye(6), heads=3), lambda x: np.where(np.arange(4)[:, None, None] == 3, np.eye(6), x)
  ),
  "a follower's": (ablate("weights", 2, positions=1), lambda x: x * _but(x, np.s_[:, :, 1])),
}  # fmt: skip


def _but(x, where):
  """Ones, but for zeros somewhere."""
  mask = np.ones_like(x)
  mask[where] = 0
  return mask


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_what_it_says(model, tokens, name):
  edit, change = CHANGES[name]
  # The layouts in turn; what is seen is tested in both.
  params = tiny.params(model, "runs" if list(CHANGES).index(name) % 2 else "layers")

  def plain_change(site, layer, x):
    meant = (site, layer) == (edit.site, edit.layer)
    return change(x) if meant else x

  logits, wanted = plainly(model, params, tokens, plain_change)
  found = look(model, params, tokens, capture=[edit.site], edits=[edit])
  assert_close(found.logits, logits)
  assert np.abs(logits - plainly(model, params, tokens)[0]).max() > 0.01
  for ours, theirs in zip(found.seen[edit.site], wanted[edit.site], strict=True):
    assert_close(ours, theirs)


def test_packed_rows(model, params, tokens):
  segments = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]], np.int32)
  logits, wanted = plainly(model, params, tokens, segments=segments)
  found = look(model, params, tokens, ops.Rows(segments=jnp.asarray(segments)), capture=["weights"])
  assert_close(found.logits, logits)
  states = model.apply({"params": params}, tokens, ops.Rows(segments=jnp.asarray(segments)), method=model.states)
  for seen, state, theirs in zip(found.seen["weights"], states, wanted["weights"], strict=True):
    assert_close(seen, theirs)
    assert_close(state.weights(), theirs)


def test_patching_between_dense_and_shared(model, tokens):
  """The shared model with what the dense one has after some layer says what the dense one does, and so for heads."""
  dense = tiny.model("dense", num_layers=LAYERS)
  whole = tiny.params(dense)
  shared = sa_jax.prune(whole, model.plan)
  wanted = look(dense, whole, tokens, capture=["residual", "heads"])
  assert float(jnp.abs(wanted.logits - look(model, shared, tokens).logits).max()) > 0.1
  late = look(model, shared, tokens, edits=[patch("residual", LAYERS, wanted.seen["residual"][LAYERS])])
  np.testing.assert_allclose(late.logits, wanted.logits, atol=1e-5)
  # Followers are where the two differ: with the dense model's heads there, all else follows.
  heads = [patch("heads", layer, wanted.seen["heads"][layer]) for layer in model.plan.followers]
  np.testing.assert_allclose(look(model, shared, tokens, edits=heads).logits, wanted.logits, atol=1e-4)


def test_a_sweep_is_one_program(model, tokens):
  from sa_jax.analysis.inside import _look_inside

  params = tiny.params(model, "runs")
  alone = [look(model, params, tokens, edits=[ablate("heads", layer, heads=[2])]).logits for layer in range(3)]
  before = _look_inside.jitted._cache_size()
  look(model, params, tokens, edits=[ablate("heads", 5, heads=[0])])
  assert _look_inside.jitted._cache_size() == before
  sweep = jax.vmap(
    lambda layer: look(model, params, tokens, edits=[ablate("heads", layer, heads=jnp.array([2]))]).logits
  )
  np.testing.assert_allclose(sweep(jnp.arange(3)), jnp.stack(alone), atol=1e-5)


def test_logit_lens(model, tokens):
  params = tiny.params(model)
  logits, wanted = plainly(model, params, tokens)
  found = logit_lens(model, params, look(model, params, tokens, capture=["residual"]).seen["residual"])
  assert_close(found[-1], logits)
  whole = params if "layers" in params else sa_jax.unstack(params, model.plan)
  x = wanted["residual"][3]
  normed = (
    x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps) * np.asarray(whole["final_norm"]["scale"])
  )
  assert_close(found[3], normed @ params["lm_head"]["kernel"])


def test_stacked_outputs_by_layer_number(model, tokens):
  """What blocks sow in the run layout is stacked as their parameters are, and `unstack` takes it apart."""
  params = tiny.params(model, "runs")
  _, sown = model.apply({"params": params}, tokens, mutable=[BLOCK_OUTPUTS])
  outputs = sa_jax.unstack(sown[BLOCK_OUTPUTS], model.plan)["layers"]
  residuals = look(model, params, tokens, capture=["residual"]).seen["residual"]
  for layer in range(LAYERS):
    np.testing.assert_allclose(outputs[str(layer)]["x"], residuals[layer + 1], atol=1e-4)


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ({"capture": ["head"]}, r"look cannot capture \['head'\]; it captures residual, weights"),
    ({"edits": [ablate("head", 0)]}, "edit 0 has the unknown site 'head'; choose from residual"),
    ({"edits": [ablate("heads", 6)]}, "edit 0 has layer 6; must be 0 to 5"),
    ({"edits": [ablate("heads", 0, heads=[1, 4])]}, r"edit 0 has heads \[1, 4\]; must be 0 to 3"),
    ({"edits": [ablate("mlp", 0, heads=[1])]}, "edit 0 selects heads, but 'mlp' has none"),
  ],
)
def test_refused(model, tokens, how, message):
  with pytest.raises(sa_jax.UserError, match=message):
    look(model, tiny.params(model), tokens, **how)
