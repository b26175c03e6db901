"""Recovery of a shared mixture of experts: W_O in closed form, and whole groups by training."""

import jax
import numpy as np

import sa_jax
from sa_jax import ops
from sa_jax.analysis.refit import Refit, refit
from tests import tiny


def test_refit_and_local_reconstruction():
  model = tiny.model("dense", num_layers=2, experts=ops.Experts(4, 2))
  params, tokens = jax.tree.map(jax.numpy.asarray, tiny.params(model)), tiny.tokens(8, 16)
  plan = sa_jax.SharingPlan.parse("0:1", 2)
  made = refit(model, params, plan, tokens, Refit(local_epochs=2))
  attention, group = made.reports
  assert (attention.layer, attention.part, group.part) == (1, "attention", "group")
  assert attention.after < 0.9 * attention.before
  assert group.after < group.before
  before, after = (each["layers"]["1"]["mlp"]["experts"]["up_proj"]["kernel"] for each in (params, made.params))
  assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0
