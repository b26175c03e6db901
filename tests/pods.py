"""What is done on a pod, small. As a program: one process of several, which writes what it found.

python -m tests.pods FOLDER PORT PROCESSES RANK
"""

import dataclasses
import faulthandler
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tokenizers

import sa_jax
from sa_jax import UserError, distributed
from sa_jax.analysis import Text
from sa_jax.analysis.align import align
from sa_jax.analysis.judge import Judge
from sa_jax.analysis.refit import refit
from sa_jax.analysis.share import Effort, share
from sa_jax.analysis.similarity import layer_similarity
from sa_jax.evaluation import Scorer
from sa_jax.formats import Tokenizer
from sa_jax.mesh import MeshSizes
from sa_jax.sharding import make_mesh
from sa_jax.train.config import DataConfig
from sa_jax.train.loop import train
from tests import tiny
from tests.train import tiny_run

PLAN = "1:2"


def model():
  return tiny.model("dense", num_layers=4, vocab_size=64, eos_token_ids=(2,))


def words() -> Tokenizer:
  """Words w00 to w63; w01 starts a text, w02 ends one."""
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{token:02}": token for token in range(64)}, "w00"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return Tokenizer(backend, None, (("bos_token", "w01"), ("eos_token", "w02")))


def write_tasks(folder: Path) -> None:
  """Three tasks of lm-eval, which choose, generate and read."""
  text = lambda length, seed: " ".join(f"w{token:02}" for token in tiny.tokens(1, length, 61, seed)[0] + 3)
  docs = [{"asked": text(6, n), "said": [text(2, 50 + n), text(3, 90 + n)], "label": n % 2} for n in range(6)]
  (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
  common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\ntest_split: test\n"
  tasks = {
    "choose": "output_type: multiple_choice\ndoc_to_text: '{{asked}}'\ndoc_to_target: label\ndoc_to_choice: said\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "finish": "output_type: generate_until\ndoc_to_text: '{{asked}}'\ndoc_to_target: '{{said[0]}}'\n"
    "generation_kwargs: {until: [w07], max_gen_toks: 5}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "read": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{asked}}'\n"
    "metric_list: [{metric: word_perplexity}]\n",
  }
  (folder / "tasks").mkdir()
  for name, rest in tasks.items():
    (folder / "tasks" / f"{name}.yaml").write_text(f"{common}task: {name}_words\n{rest}")


def evaluated(folder: Path, model: sa_jax.Transformer, params) -> dict[str, object]:
  """What lm-eval finds, and what it was answered."""
  from sa_jax.evaluation.harness import metrics, run_tasks
  from sa_jax.evaluation.lm import SharedAttentionLM
  from sa_jax.evaluation.settings import Asking, Limits

  lm = SharedAttentionLM(model, params, words(), limits=Limits(batch_tokens=256, slots=2))
  names = ["choose_words", "finish_words", "read_words"]
  found = run_tasks(lm, names, Asking(log_samples=True), include=[folder / "tasks"])
  generated = [sample["resps"] for sample in found["samples"]["finish_words"]]
  return {"metrics": {f"{each.task} {each.metric}": each.value for each in metrics(found)}, "generated": generated}


def work(folder: Path, out: Path, sizes: dict[str, int]) -> dict[str, object]:
  """Everything that takes parameters, on a mesh; files go to ``out``."""
  mesh = make_mesh(**sizes)
  shared, params = sa_jax.from_pretrained(folder / "model", PLAN, "float32", mesh=mesh)
  tokens = tiny.tokens(4, 16, 64)
  found: dict[str, object] = {"loss": sa_jax.perplexity(shared, params, tokens, batch_size=4).loss}
  for name, slots in (("tokens", 64), ("batched", 2)):
    found[name] = sa_jax.generate(shared, params, tokens, max_new_tokens=5, slots=slots).tokens.tolist()
  requests = [(tiny.tokens(1, 5 + number, 64, number)[0], [number + 3, 7]) for number in range(6)]
  found["scores"] = [score.log_likelihood for score in Scorer(shared, params, batch_tokens=64)(requests)]
  found["cosine"] = layer_similarity(shared, params, tokens[:1], block=16).cosine.tolist()
  if importlib.util.find_spec("lm_eval") is not None:
    found |= evaluated(folder, shared, params)
  dense, params = sa_jax.from_pretrained(folder / "model", "dense", "float32", mesh=mesh, layout="layers")
  texts = [Text("text", tokens[:2], tokens[2:])]
  made = share(dense, params, texts, 1, Effort(mlp=True), chunk=2)
  found["plan"] = str(made.model.plan)
  found["shared"] = made.shared["text"].loss
  found["aligned"] = align(dense, params, sa_jax.SharingPlan.parse(PLAN, 4), tokens, chunk=4).loss
  sa_jax.save(out / "shared", made.model, made.params)
  sa_jax.convert(folder / "model", out / "converted", dtype="float32")
  sa_jax.export(out / "converted", out / "exported")
  Judge(dense, params, texts, None, chunk=2, record=out / "record.json").losses(made.model.plan)
  return found


def faults(folder: Path, rank: int) -> list[str]:
  """What is said where processes differ."""

  def said(call) -> str:
    try:
      call()
    except UserError as error:
      return str(error)
    return "nothing"

  shared, params = sa_jax.from_pretrained(folder / "model", PLAN, "float32", mesh=make_mesh(fsdp=jax.device_count()))
  text = folder / f"host-{rank}" / "text.txt"
  text.parent.mkdir()
  text.write_text(f"A text of host {rank}.\n\n" * 20)
  os.chdir(text.parent)  # of one name on every host
  data = DataConfig(train=(Path(text.name),), length=32)
  run = tiny_run.config(folder / "run", data=data, mesh=MeshSizes(fsdp=jax.device_count()))
  mine = folder / ("model" if rank == 0 else "nowhere")
  return [
    said(lambda: sa_jax.perplexity(shared, params, tiny.tokens(4, 16, 64, seed=rank))),
    said(lambda: sa_jax.from_pretrained(mine, mesh=make_mesh(fsdp=jax.device_count()))),
    said(lambda: sa_jax.convert(folder / "nowhere", folder / "converted")),
    said(lambda: train(dataclasses.replace(run, seed=rank))),
    said(lambda: train(run)),
    said(lambda: distributed.exchange("a step that process 1 leaves out", "", 1.0)) if rank == 0 else "",
    *map(said, different_calls(folder, rank)),
  ]


def different_calls(folder: Path, rank: int) -> list[Callable[[], object]]:
  """What processes ask for differently."""
  mesh = make_mesh(fsdp=jax.device_count())
  dense, params = sa_jax.from_pretrained(folder / "model", "dense", "float32", mesh=mesh, layout="layers")
  tokens, plan = tiny.tokens(4, 16, 64), sa_jax.SharingPlan.parse(PLAN, 4)
  texts = [Text("text", tokens[:2], tokens[2:])]
  batcher = sa_jax.decode.Batcher(dense, params, sa_jax.decode.Serving(slots=2, capacity=32))
  batcher.submit(tokens[rank], 4)
  request = (tokens[0], [3])
  judge = Judge(dense, params, texts, None)
  return [
    lambda: sa_jax.generate(dense, params, tokens, max_new_tokens=3 + rank),
    batcher.step,
    lambda: Scorer(dense, params, batch_tokens=64 << rank)([request]),
    lambda: Scorer(dense, params)([request] * (1 + rank)),
    lambda: refit(dense, params, plan, tokens, chunk=1 + rank),
    lambda: align(dense, params, sa_jax.SharingPlan.parse(("1:2", "0:1")[rank], 4), tokens),
    lambda: share(dense, params, texts, 1 + rank),
    lambda: judge.losses(sa_jax.SharingPlan.parse(("1:2", "0:1")[rank], 4)),
    lambda: sa_jax.from_pretrained(folder / "model", mesh=mesh, layout=("runs", "layers")[rank]),
  ]


def main(folder: str, port: str, processes: str, rank: str) -> None:
  faulthandler.dump_traceback_later(400, exit=True)  # where it hangs, if it does
  distributed.start(distributed.Hosts(True, f"127.0.0.1:{port}", int(processes), int(rank)))
  top = Path(folder)
  found = work(top, top / "two", {"slice": 2, "fsdp": 2, "tensor": 2})
  rows = distributed.rows_of_all(np.full((1 + int(rank), 3), int(rank)))
  found |= {"faults": faults(top, int(rank)), "rows": rows.tolist()}
  (top / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
