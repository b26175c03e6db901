"""lm-eval's own tasks on local data: writes documents in each task's schema, and YAML that points to them.

    python tasks.py DATA OUT
    sa-jax eval MODEL --include-path OUT --tasks mmlu gsm8k hellaswag rte

Prompts, choices, metrics and few-shot examples stay lm-eval's; only the source of the documents changes.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks.hellaswag.utils import preprocess

STOCK = Path(lm_eval.tasks.__file__).parent
Documents = Iterable[dict[str, Any]]


def jsonl(path: Path) -> Documents:
  """One JSON object per line."""
  return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def tsv(path: Path, names: list[str] | None = None) -> Documents:
  """One row per line, as in GLUE: no quoting; column names from the first line, or ``names``."""
  lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()]
  names = names or lines.pop(0)
  return (dict(zip(names, line, strict=True)) for line in lines)


def mmlu(path: Path) -> Documents:
  """Question, four choices, the answer's letter; no header."""
  with path.open(newline="", encoding="utf-8") as file:
    for question, *choices, answer in csv.reader(file):
      yield {"question": question, "choices": choices, "answer": "ABCD".index(answer)}


def hellaswag(documents: Documents) -> Documents:
  """The subset has whole contexts, without activity labels; texts are cleaned as in lm-eval."""
  for each in documents:
    yield {
      "query": preprocess(each["question"]),
      "choices": [preprocess(each["choices"][letter]) for letter in "ABCD"],
      "label": "ABCD".index(each["answer"]),
    }


def arc(documents: Documents) -> Documents:
  """ARC's own schema."""
  for each in documents:
    labels = [str(number) for number in range(len(each["choices"]))]
    question = each["query"].removeprefix("Question: ").strip()
    yield {
      "question": question,
      "choices": {"text": each["choices"], "label": labels},
      "answerKey": labels[each["gold"]],
    }


def piqa(documents: Documents) -> Documents:
  """PIQA's own schema."""
  for each in documents:
    goal = each["query"].removeprefix("Question: ").strip()
    yield {"goal": goal, "sol1": each["choices"][0], "sol2": each["choices"][1], "label": each["gold"]}


def winogrande(documents: Documents) -> Documents:
  """WinoGrande's own schema: the common part of the two contexts, a gap, and the rest."""
  for each in documents:
    contexts = each["context_options"]
    words = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*(text.split(" ") for text in contexts)))
    common = "".join(f"{word} " for word, _ in words)
    yield {
      "sentence": f"{common}_ {each['continuation']}",
      "option1": contexts[0].removeprefix(common),
      "option2": contexts[1].removeprefix(common),
      "answer": str(each["gold"] + 1),
    }


def boolq(documents: Documents) -> Documents:
  """BoolQ's own schema."""
  for each in documents:
    passage, _, question = each["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    yield {"passage": passage.strip(), "question": question.strip().rstrip("?"), "label": each["gold"]}


def labelled(documents: Documents, **names: str) -> Documents:
  """Columns renamed for lm-eval, with an integer label."""
  for each in documents:
    yield {new: each[old] for new, old in names.items()} | {"label": int(each["label"])}


def sources(data: Path) -> dict[str, tuple[str, dict[str, Callable[[], Documents]], dict[str, Any]]]:
  """For each task: lm-eval's file, the documents of its splits, and additional YAML values."""
  glue, foundry = data / "glue", data / "llm_foundry"
  cola = ["source", "label", "star", "sentence"]
  paraphrase = {"sentence1": "#1 String", "sentence2": "#2 String"}
  pair = {"sentence1": "sentence1", "sentence2": "sentence2"}
  mrpc = lambda part: (row | {"label": row["Quality"]} for row in tsv(glue / "MRPC" / f"msr_paraphrase_{part}.txt"))
  swag = lambda part: json.loads((data / "hellaswag_abstainqa_1k_dev_1k_test.json").read_text(encoding="utf-8"))[part]
  table: dict[str, tuple[str, dict[str, Callable[[], Documents]], dict[str, Any]]] = {
    "gsm8k": (
      "gsm8k/gsm8k.yaml",
      {"train": lambda: jsonl(data / "gsm8k_train.jsonl"), "test": lambda: jsonl(data / "gsm8k_test.jsonl")},
      {},
    ),
    "hellaswag": (
      "hellaswag/hellaswag.yaml",
      {"train": lambda: hellaswag(swag("dev")), "validation": lambda: hellaswag(swag("test"))},
      {"process_docs": None},
    ),
    "rte": (
      "glue/rte/default.yaml",
      {
        "train": lambda: labelled(tsv(glue / "RTE" / "train.tsv"), **pair),
        "validation": lambda: labelled(tsv(glue / "RTE" / "dev.tsv"), **pair),
      },
      {},
    ),
    "cola": (
      "glue/cola/default.yaml",
      {
        "train": lambda: labelled(tsv(glue / "CoLA" / "in_domain_train.tsv", cola), sentence="sentence"),
        "validation": lambda: labelled(
          (row for part in ("in", "out_of") for row in tsv(glue / "CoLA" / f"{part}_domain_dev.tsv", cola)),
          sentence="sentence",
        ),
      },
      {},
    ),
    "mrpc": (
      "glue/mrpc/default.yaml",
      {
        "train": lambda: labelled(mrpc("train"), **paraphrase),
        "validation": lambda: labelled(mrpc("test"), **paraphrase),
      },
      {},
    ),
    "sst2": (
      "glue/sst2/default.yaml",
      {
        "train": lambda: labelled(tsv(glue / "SST-2" / "alps_dev.tsv"), sentence="sentence"),
        "validation": lambda: labelled(tsv(glue / "SST-2" / "alps_test.tsv"), sentence="sentence"),
      },
      {},
    ),
    "wnli": (
      "glue/wnli/default.yaml",
      {
        "train": lambda: labelled(tsv(glue / "WNLI" / "train.tsv"), **pair),
        "validation": lambda: labelled(tsv(glue / "WNLI" / "dev.tsv"), **pair),
      },
      {},
    ),
    "arc_easy": ("arc/arc_easy.yaml", {"test": lambda: arc(jsonl(foundry / "arc_easy.jsonl"))}, {}),
    "arc_challenge": ("arc/arc_challenge.yaml", {"test": lambda: arc(jsonl(foundry / "arc_challenge.jsonl"))}, {}),
    "piqa": ("piqa/piqa.yaml", {"validation": lambda: piqa(jsonl(foundry / "piqa.jsonl"))}, {}),
    "winogrande": (
      "winogrande/default.yaml",
      {"validation": lambda: winogrande(jsonl(foundry / "winogrande.jsonl"))},
      {},
    ),
    "boolq": ("super_glue/boolq/default.yaml", {"validation": lambda: boolq(jsonl(foundry / "boolq.jsonl"))}, {}),
    "lambada_openai": (
      "lambada/lambada_openai.yaml",
      {
        "test": lambda: (
          {"text": f"{each['context']} {each['continuation']}"} for each in jsonl(foundry / "lambada_openai.jsonl")
        )
      },
      {},
    ),
  }
  for file in sorted((data / "mmlu" / "test").glob("*_test.csv")):
    subject = file.name.removesuffix("_test.csv")
    table[f"mmlu_{subject}"] = (
      f"mmlu/default/mmlu_{subject}.yaml",
      {
        "dev": lambda subject=subject: mmlu(data / "mmlu" / "dev" / f"{subject}_dev.csv"),  # type: ignore[misc]
        "test": lambda file=file: mmlu(file),  # type: ignore[misc]
      },
      {"num_fewshot": 5},
    )
  return table


def write_tasks(data: Path, out: Path) -> list[str]:
  """Writes documents and YAML.

  Args:
    data: folder with gsm8k, mmlu, glue and llm_foundry files.
    out: folder for ``--include-path``.

  Returns:
    The tasks, and the group ``mmlu``.
  """
  (out / "documents").mkdir(parents=True, exist_ok=True)
  splits_of = ("training_split", "validation_split", "test_split", "fewshot_split")
  names = []
  for name, (stock, splits, more) in sources(data).items():
    files = {}
    for split, documents in splits.items():
      file = out.resolve() / "documents" / f"{name}_{split}.jsonl"
      file.write_text("".join(json.dumps(each) + "\n" for each in documents()), encoding="utf-8")
      files[split] = str(file)
    loaded = lm_eval.tasks._yaml_loader.load_yaml(STOCK / stock, resolve_func=False, recursive=True)
    # Do not let lm-eval ask for a missing split.
    absent = {key: None for key in splits_of if loaded.get(key) and loaded[key] not in splits}
    config = {
      "include": str(STOCK / stock),
      "task": name,
      "tag": None,
      "dataset_path": "json",
      "dataset_name": None,
      "dataset_kwargs": {"data_files": files},
    }
    (out / f"{name}.yaml").write_text(yaml.safe_dump(config | absent | more), encoding="utf-8")
    names.append(name)
  group = {
    "group": "mmlu",
    "task": [name for name in names if name.startswith("mmlu_")],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    "metadata": {"version": 2},
  }
  (out / "mmlu.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
  return [*names, "mmlu"]


if __name__ == "__main__":
  print(" ".join(write_tasks(Path(sys.argv[1]), Path(sys.argv[2]))))
