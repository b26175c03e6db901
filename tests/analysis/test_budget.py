"""Budgets by name."""

import dataclasses
import math

import pytest

import sa_jax
from sa_jax.analysis.budget import Budget
from sa_jax.config import ModelConfig

CONFIG = ModelConfig.preset("llama-2-7b")


def test_numbers_and_shares_of_the_cost():
  assert Budget.parse("8").most(CONFIG) == Budget.parse(" followers=8").most(CONFIG) == 8
  assert Budget.parse("kv=87.5%").most(CONFIG) == 8
  assert Budget.parse("flops=95%").most(CONFIG) == min(
    count
    for count in range(32)
    if sa_jax.cost(CONFIG, sa_jax.SharingPlan.from_followers(32, range(1, count + 1)), 1, 1024).flops
    <= 0.95 * sa_jax.cost(CONFIG, None, 1, 1024).flops
  )
  assert math.isinf(Budget.parse("kv=87.5%").nats)


def test_what_is_counted_is_followers():
  assert Budget.parse("flops=95%").counted(CONFIG, 1024) == Budget("followers", Budget.parse("flops=95%").most(CONFIG))
  assert Budget.parse("ppl=1.05").counted(CONFIG, 1024) == Budget.parse("ppl=1.05")


def test_a_limit_of_perplexity():
  budget = Budget.parse("ppl=1.05")
  assert (budget.most(CONFIG), budget.nats) == (31, pytest.approx(math.log(1.05)))


@pytest.mark.parametrize("text", ["8 followers", "kv=80%", "flops=95%", "kv=7%", "ppl=1.05", "ppl=1.0000001"])
def test_they_are_spelt_as_they_are_read(text):
  assert str(Budget.parse(text.removesuffix(" followers"))) == text


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("32", "1 to 31"), ("kv=40%", "51.6%"), ("half", "none of"), ("0", "at least 1"), ("kv=80", "none of"),
    ("ppl=5%", "none of"), ("2.5", "whole number"), ("ppl=0.9", "must exceed 1"), ("kv=120%", "between"),
    ("cost=5", "none of"),
  ],
)  # fmt: skip
def test_bad_ones(text, message):
  with pytest.raises(sa_jax.UserError, match=message):
    Budget.parse(text).most(CONFIG)


def test_only_layers_that_see_what_the_one_before_sees_can_follow():
  """As in gpt-oss and Gemma 2, where every second layer is local: none. Of Gemma 3's six, four can."""
  local = lambda *layers: dataclasses.replace(CONFIG, num_layers=6, window=8, local_layers=layers)
  assert local(0, 1, 2, 3, 4).can_follow == (1, 2, 3, 4)
  assert Budget.parse("kv=70%").most(local(0, 1, 2, 3, 4)) == 4
  with pytest.raises(ValueError, match=r"5 followers are impossible: .* can have 1 to 4, which see the same keys"):
    Budget("followers", 5).most(local(0, 1, 2, 3, 4))
  with pytest.raises(ValueError, match=r"no layer of the model can follow: .* \[0, 2, 4\] are local"):
    Budget.parse("ppl=1.1").most(local(0, 2, 4))
  with pytest.raises(ValueError, match="different keys"):
    sa_jax.cost(local(0, 2, 4), "0:1")
  with pytest.raises(ValueError, match="a model of one layer has no layer that can follow"):
    Budget.parse("ppl=1.1").most(dataclasses.replace(CONFIG, num_layers=1))
