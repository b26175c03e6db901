"""Groups of lm-eval's tasks: their samples, and differences between two models on them."""

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sa-jax[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

from lm_eval.api.metrics import pooled_sample_stderr  # noqa: E402

from sa_jax.evaluation.differences import differences  # noqa: E402
from sa_jax.evaluation.harness import metrics  # noqa: E402


def test_groups_of_documents_are_paired_as_lm_eval_pools_them():
  rng = np.random.default_rng(0)
  sizes = {"a": 5, "b": 9}

  def results(values, stderr):
    samples = {
      task: [{"filter": "none", "acc": value, "doc_id": at, "doc_hash": f"{task}{at}"} for at, value in enumerate(of)]
      for task, of in values.items()
    }
    mean = np.concatenate(list(values.values())).mean()
    return {
      "results": {"all": {"acc,none": mean, "acc_stderr,none": stderr}},
      "groups": {"all": {"acc,none": mean, "acc_stderr,none": stderr}},
      "group_subtasks": {"all": ["a", "b"]},
      "samples": samples,
    }

  before, after = ({task: rng.normal(size=size) for task, size in sizes.items()} for _ in range(2))
  apart = [after[task] - before[task] for task in sizes]
  errors = [each.std(ddof=1) / np.sqrt(len(each)) for each in apart]
  old, new = results(before, 0.3), results(after, 0.4)
  (found,) = differences(old, new).values()
  assert found.paired
  assert found.value == pytest.approx(np.concatenate(apart).mean())
  assert found.stderr == pytest.approx(pooled_sample_stderr(errors, list(sizes.values())))
  new["samples"]["a"][0]["doc_hash"] = "another document"
  (found,) = differences(old, new).values()
  assert not found.paired
  assert found.stderr == pytest.approx(0.5)


def test_groups_of_groups_have_the_samples_of_their_members():
  results = {
    "results": {"a": {"acc,none": 0.5}, "b": {"acc,none": 1.0}, "alone": {"acc,none": 0.25}},
    "groups": {"all": {"acc,none": 0.75, "acc_stderr,none": 0.1}, "some": {"acc,none": 0.75}},
    "group_subtasks": {"all": ["some"], "some": ["a", "b"]},
    "n-samples": {"a": {"effective": 3}, "b": {"effective": 4}, "alone": {"effective": 5}},
  }
  found = [(each.task, each.samples) for each in metrics(results)]
  assert found == [("all", 7), ("some", 7), ("alone", 5)]
