"""Plans: what is derived from `source`, the plan string, and every refusal's text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_jax import SharingPlan, UserError
from sa_jax.plan import LayerGroup, Run, as_plan


def plans(max_layers: int = 20) -> st.SearchStrategy[SharingPlan]:
  """Any plan: one follower flag a layer after the first."""
  flags = st.lists(st.booleans(), max_size=max_layers - 1)
  return flags.map(lambda flags: SharingPlan.from_followers(len(flags) + 1, [i + 1 for i, f in enumerate(flags) if f]))


def test_literal():
  plan = SharingPlan.parse("1:2,3:4-5,6:7-8", 10)
  assert plan.source == (0, 1, 1, 3, 3, 3, 6, 6, 6, 9)
  assert plan.anchors == (0, 1, 3, 6, 9)
  assert plan.followers == (2, 4, 5, 7, 8)
  assert plan.groups == (
    LayerGroup(0, ()),
    LayerGroup(1, (2,)),
    LayerGroup(3, (4, 5)),
    LayerGroup(6, (7, 8)),
    LayerGroup(9, ()),
  )
  assert plan.runs == (Run(0, 1, 0), Run(1, 1, 1), Run(3, 2, 2), Run(9, 1, 0))
  assert [list(run.layers) for run in plan.runs] == [[0], [1, 2], [3, 4, 5, 6, 7, 8], [9]]
  assert [layer for layer in range(10) if plan.is_anchor(layer)] == [0, 1, 3, 6, 9]


def test_runs_of_llama_2_7b():
  assert SharingPlan.parse("26:27-30", 32).runs == (Run(0, 26, 0), Run(26, 1, 4), Run(31, 1, 0))


def test_notation_of_the_reference():
  """Its "shared layers" 23..26 reuse layer 22."""
  plan = SharingPlan.from_followers(num_layers=32, followers=[26, 23, 25, 24])
  assert plan == SharingPlan.parse("22:23-26", num_layers=32)
  assert plan.source[22:27] == (22,) * 5


def test_is_a_value():
  assert SharingPlan.parse(" 1:2-2 , 4:5", 6) == SharingPlan((0, 1, 1, 3, 4, 4))
  assert len({SharingPlan.dense(4), SharingPlan.parse("dense", 4), SharingPlan((0, 1, 2, 3))}) == 1
  assert str(SharingPlan.dense(4)) == "dense"
  assert str(SharingPlan((0, 0, 2, 2, 2))) == "0:1,2:3-4"


@given(plans())
def test_parse_reads_what_str_writes(plan):
  assert SharingPlan.parse(str(plan), plan.num_layers) == plan


@given(plans())
def test_every_notation_gives_the_same_plan(plan):
  assert SharingPlan.from_followers(plan.num_layers, reversed(plan.followers)) == plan
  assert SharingPlan(plan.source) == plan
  for form in (plan, str(plan), list(plan.source)):
    assert as_plan(form, plan.num_layers) == plan


@given(plans())
def test_groups_and_runs_cover_the_layers_in_order(plan):
  layers = list(range(plan.num_layers))
  assert [layer for anchor, followers in plan.groups for layer in (anchor, *followers)] == layers
  assert [layer for run in plan.runs for layer in run.layers] == layers
  assert sorted(plan.anchors + plan.followers) == layers
  assert all(plan.source[layer] == anchor for anchor, followers in plan.groups for layer in (anchor, *followers))
  assert sum(run.groups for run in plan.runs) == len(plan.groups)
  # Maximal: neighbouring runs differ.
  assert all(a.followers != b.followers for a, b in zip(plan.runs, plan.runs[1:]))


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=6))
def test_a_source_is_a_plan_or_refused(source):
  """Accepted exactly when each layer's source is itself or its predecessor's source, from layer 0 on."""
  valid = source[0] == 0 and all(s in (layer, source[layer - 1]) for layer, s in enumerate(source) if layer)
  if valid:
    assert list(SharingPlan(tuple(source)).source) == source
  else:
    with pytest.raises(ValueError, match="layer"):
      SharingPlan(tuple(source))


@pytest.mark.parametrize("source", [(0, 0.9), (0, False), 5])
def test_sources_are_layers(source):
  with pytest.raises(UserError, match=r"^plan: source=.*must be (an integer|a tuple).*\)"):
    as_plan(source, 2)


@given(st.text(alphabet="0123456789:-, dens", max_size=12), st.integers(1, 12))
def test_any_text_is_a_plan_or_refused(text, num_layers):
  try:
    plan = SharingPlan.parse(text, num_layers)
  except ValueError:
    return
  assert plan.num_layers == num_layers
  assert SharingPlan.parse(str(plan), num_layers) == plan


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "'' is not a group of a plan: '22:23-26' is anchor 22 with followers 23 to 26"),
    ("23-26", "'23-26' is not a group of a plan"),
    ("2:3,", "'' is not a group of a plan"),
    ("zoo:8", "'zoo:8' is a plan under which a model must be refitted: `sa-jax share MODEL TEXT --plan zoo:8`"),
    ("2:3;4:5", "'2:3;4:5' is not a group of a plan"),
    ("-1:0", "'-1:0' is not a group of a plan"),
    ("2:5-3", "'2:5-3' in the plan '2:5-3' is reversed: write '2:3-5'"),
    ("6:7-8", "'6:7-8' in the plan '6:7-8' goes past the model, whose layers are 0 to 7"),
    ("2:4-5", "'2:4-5' .* the followers of 2 start at 3, and followers that start at 4 have anchor 3"),
    ("2:2-3", "'2:2-3' .* the followers of 2 start at 3, and followers that start at 2 have anchor 1"),
    ("0:0", "the followers of 0 start at 1"),
    ("1:2-4,3:4", "'3:4' .* overlaps an earlier group in layers \\[3, 4\\]: each layer belongs to one group"),
    ("1:2,2:3", "'2:3' .* overlaps an earlier group in layers \\[2\\]"),
  ],
)
def test_refused_strings(text, message):
  with pytest.raises(ValueError, match=message):
    SharingPlan.parse(text, 8)


@pytest.mark.parametrize(
  ("followers", "message"),
  [
    ([0, 1], "layer 0 cannot be a follower: no layer before it could be its anchor"),
    ([2, 3, 2], "followers are listed more than once: \\[2\\]"),
    ([3, 8, -1], "followers \\[-1, 8\\] are outside the model, whose layers are 0 to 7"),
  ],
)
def test_refused_followers(followers, message):
  with pytest.raises(ValueError, match=message):
    SharingPlan.from_followers(8, followers)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ((), "a plan needs at least one layer"),
    ((1, 1), "layer 0 cannot be a follower"),
    (
      (0, 1, 0),
      "layer 2 uses the weights of layer 0, but the nearest anchor before it is 1: .* its source is 1 \\(or 2,",
    ),
    ((0, 2, 2), "layer 1 uses the weights of layer 2"),
  ],
)
def test_refused_sources(source, message):
  with pytest.raises(ValueError, match=message):
    SharingPlan(source)


@pytest.mark.parametrize("form", [SharingPlan.dense(4), [0, 1, 2, 3]])
def test_plan_of_another_depth(form):
  with pytest.raises(ValueError, match="the plan is for 4 layers, the model has 5"):
    as_plan(form, 5)


def test_no_plan_is_dense():
  assert as_plan(None, 3) == SharingPlan.dense(3)
