"""convert, generate, perplexity, cost and the demo's picture, as a user types them."""

import dataclasses
import gc
import io
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import sa_jax
from sa_jax import ops
from sa_jax.cli import main
from sa_jax.cli.common import console
from sa_jax.cli.process import own
from sa_jax.cli.texts import read_strings
from sa_jax.nn import Cache
from tests import tiny

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "llama-gqa-8l"
PLAN = "1:2-3,4:5-6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The reference's model, with a tokenizer whose words are the numbers of its tokens."""
  path = tmp_path_factory.mktemp("model")
  for name in ("config.json", "model.safetensors"):
    shutil.copy(REFERENCE / name, path)
  tokenizer = Tokenizer(WordLevel({str(token): token for token in range(199)}, unk_token="0"))
  tokenizer.pre_tokenizer = Whitespace()
  tokenizer.save(str(path / "tokenizer.json"))
  return path


@pytest.fixture(scope="module")
def expected():
  return tiny.arrays_of(REFERENCE / "expected.npz")


def test_generate_says_what_the_reference_says(folder, expected, tmp_path):
  """The left-padded batch's rows, as prompts of unequal length."""
  rows = zip(expected["input_ids"], expected["attention_mask"], strict=True)
  prompts = [" ".join(map(str, row[mask == 1])) for row, mask in rows]
  out = tmp_path / "out.json"
  assert main(["generate", str(folder), *prompts, "--plan", PLAN, "--max-new-tokens", "24", "--json", str(out)]) == 0
  results = json.loads(out.read_text())["results"]
  assert [result["tokens"] for result in results] == expected["greedy_tokens"].tolist()


def test_generate_prints_one_continuation_as_it_comes(folder, expected, tmp_path, capsys):
  prompt = " ".join(map(str, expected["input_ids"][0][expected["attention_mask"][0] == 1]))
  out = tmp_path / "out.json"
  assert main(["generate", str(folder), prompt, "--plan", PLAN, "--max-new-tokens", "24", "--json", str(out)]) == 0
  (result,) = json.loads(out.read_text())["results"]
  assert result["tokens"] == expected["greedy_tokens"][0].tolist()
  assert capsys.readouterr().out.startswith(result["text"] + "\n")


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_ends_a_continuation(folder, expected, tmp_path, capsys, count):
  """One that spans tokens, of one prompt whose text is printed as it comes, and of several."""
  rows = list(zip(expected["input_ids"], expected["attention_mask"], strict=True))[:count]
  prompts = [" ".join(map(str, row[mask == 1])) for row, mask in rows]
  whole = expected["greedy_tokens"][:count].tolist()
  stop = f"{whole[0][5]} {whole[0][6]}"
  out = tmp_path / "out.json"
  arguments = ["generate", str(folder), *prompts, "--plan", PLAN, "--max-new-tokens", "24", "--json", str(out)]
  assert main([*arguments, "--stop", stop]) == 0
  for tokens, result in zip(whole, json.loads(out.read_text())["results"], strict=True):
    texts = [" ".join(map(str, tokens[:size])) for size in range(1, 25)]
    size = next((size for size, text in enumerate(texts, 1) if stop in text), 24)
    assert result == {"prompt": result["prompt"], "text": texts[-1].split(stop)[0], "tokens": tokens[:size]}
    assert result["text"] in capsys.readouterr().out or count > 1
  assert len(tokens[:size]) < 24 or count > 1


def test_generate_samples_as_its_flags_say(folder, expected, tmp_path):
  prompt = " ".join(map(str, expected["input_ids"][0][expected["attention_mask"][0] == 1]))
  out = tmp_path / "out.json"

  def tokens(*flags):
    arguments = ["generate", str(folder), prompt, "--plan", PLAN, "--max-new-tokens", "24", "--json", str(out)]
    assert main([*arguments, *flags]) == 0
    return json.loads(out.read_text())["results"][0]["tokens"]

  greedy = expected["greedy_tokens"][0].tolist()
  assert tokens("--temperature", "5") != greedy
  assert tokens("--temperature", "5", "--min-p", "1") == greedy  # only the likeliest token is as likely as it
  apart = tokens("--repetition-penalty", "1e6")
  assert len(set(apart)) == 24
  assert not set(apart) & set(map(int, prompt.split()))


def test_prompts_come_from_files_and_pipes(folder, expected, tmp_path, monkeypatch, capsys):
  rows = zip(expected["input_ids"], expected["attention_mask"], strict=True)
  prompts = [" ".join(map(str, row[mask == 1])) for row, mask in rows]
  file, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
  file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[1:]))
  monkeypatch.setattr("sys.stdin", io.StringIO(prompts[0]))
  arguments = ["generate", str(folder), "-", "--prompts", str(file), "--plan", PLAN, "--max-new-tokens", "24"]
  assert main([*arguments, "--json", str(out)]) == 0
  assert [each["tokens"] for each in json.loads(out.read_text())["results"]] == expected["greedy_tokens"].tolist()
  file.write_text('{"prompt": "1"}\n{"prompt": 2}\n\nnone\n')
  with pytest.raises(ValueError, match="prompts.jsonl:\n  line 2 is not .*\n  line 4 is not"):
    read_strings(file, "prompt")
  file.write_text("\n")
  assert main([*arguments[:2], "--prompts", str(file)]) == 2
  assert "prompts.jsonl has no prompts" in capsys.readouterr().err
  (tmp_path / "one.txt").write_text("1 2\n3\n")
  assert read_strings(tmp_path / "one.txt", "prompt") == ["1 2\n3\n"]


def test_a_chat_remembers_until_it_begins_again(folder, tmp_path, monkeypatch, capsys):
  model = tmp_path / "model"
  shutil.copytree(folder, model)
  template = "{% for m in messages %}{% if m.role == 'assistant' %}7 {% endif %}{{ m.content }} {% endfor %}{{ last }}"
  (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
  monkeypatch.setattr("sys.stdin", io.StringIO("3 4\n\n5\n/new\n3 4\n/exit\n6\n"))
  assert main(["chat", str(model), "--system", "8", "--max-new-tokens", "4", "--options", "last=9"]) == 0
  said = [line for line in capsys.readouterr().out.splitlines() if line and line[0].isdecimal()]
  opened, params = sa_jax.from_pretrained(folder, layout="layers")

  def answer(*tokens):
    out = sa_jax.generate(opened, params, [[8, *tokens, 9]], max_new_tokens=4)
    return out.tokens[0, : out.lengths[0]].tolist()

  first = answer(3, 4)
  second = answer(3, 4, 7, *first, 5)
  assert said == [" ".join(map(str, tokens)) for tokens in (first, second, first)]


def test_perplexity_is_the_reference_s_loss(folder, expected, tmp_path, capsys):
  text, out = tmp_path / "text.txt", tmp_path / "out.json"
  text.write_text(" ".join(map(str, expected["input_ids"].ravel())))
  arguments = ["perplexity", str(folder), str(text), "--plan", PLAN, "dense", "--length", "21", "--json", str(out)]
  assert main(arguments) == 0
  results = json.loads(out.read_text())
  assert results[PLAN]["loss"] == pytest.approx(float(expected["loss"]), abs=1e-5)
  assert results["dense"]["loss"] != pytest.approx(results[PLAN]["loss"], abs=1e-3)
  assert f"{results[PLAN]['perplexity']:.3f}" in capsys.readouterr().out


def test_perplexity_with_keys_and_values_as_a_cache_holds_them(folder, expected, tmp_path):
  """What a model says that reads a row token by token, and each time what its cache holds."""
  text, out = tmp_path / "text.txt", tmp_path / "out.json"
  tokens = np.asarray(expected["input_ids"])[:1]
  text.write_text(" ".join(map(str, tokens.ravel())))
  model, params = sa_jax.from_pretrained(folder, dtype="float32", layout="layers")
  losses = []
  for flags, config in (
    ([], model.config),
    (["--cache-dtype", "int4"], dataclasses.replace(model.config, cache_dtype="int4")),
  ):
    arguments = ["perplexity", str(folder), str(text), "--length", str(tokens.size), "--json", str(out)]
    assert main([*arguments, "--plan", "dense", *flags]) == 0
    losses.append(json.loads(out.read_text())["dense"]["loss"])
    reader = sa_jax.Transformer(config, model.plan)
    cache, each = Cache.empty(config, model.plan, 1, tokens.size), []
    for at in range(tokens.size - 1):
      rows = ops.Rows(jnp.array([at + 1]), offset=jnp.array([at]))
      given = {"params": params}, tokens[:, at : at + 1], cache, rows
      hidden, cache = reader.apply(*given, method=reader.extend)
      logits = reader.apply({"params": params}, hidden, method=reader.logits)[0, 0]
      each.append(float(jax.nn.logsumexp(logits) - logits[tokens[0, at + 1]]))
    assert losses[-1] == pytest.approx(np.mean(each), abs=1e-5)
  assert losses[0] != pytest.approx(losses[1], abs=1e-4)


def test_every_row_begins_with_the_start_token(folder, tmp_path, capsys):
  """That of the tokenizer, or what the flag says; it is counted in the length, and scored nowhere."""
  model = tmp_path / "model"
  shutil.copytree(folder, model)
  backend = Tokenizer.from_file(str(model / "tokenizer.json"))
  backend.post_processor = TemplateProcessing(single="198 $A 197", special_tokens=[("198", 198), ("197", 197)])
  backend.save(str(model / "tokenizer.json"))
  text, out = tmp_path / "text.txt", tmp_path / "out.json"
  numbers = np.random.default_rng(0).integers(1, 190, 30)
  text.write_text(" ".join(map(str, numbers)))
  opened, params = sa_jax.from_pretrained(folder, dtype="float32")
  for flags, start in (([], 198), (["--start-token", "none"], None), (["--start-token", "5"], 5)):
    assert main(["perplexity", str(model), str(text), "--length", "10", "--json", str(out), *flags]) == 0
    rows = numbers[:27].reshape(3, 9) if start is not None else numbers.reshape(3, 10)
    rows = rows if start is None else np.insert(rows, 0, start, axis=1)
    logits = np.asarray(opened.apply({"params": params}, rows), np.float64)[:, :-1]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(logits, rows[:, 1:, None], -1).mean()
    (found,) = json.loads(out.read_text()).values()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["tokens"] == 27
    assert ("rows of 10 tokens" + (f", start token {start}" if start else "")) in capsys.readouterr().out


def test_float32_means_float32(folder, tmp_path, monkeypatch):
  """Accelerators round the operands of float32 products unless they are told not to; no other type's are affected."""
  text, used = tmp_path / "text.txt", {}
  text.write_text("1 2 3 4 5 6")

  def scored(model, params, tokens, **_):
    used[model.config.dtype] = jax.config.jax_default_matmul_precision
    return sa_jax.evaluation.Perplexity(1.0, 0.0, tokens.size)

  monkeypatch.setattr(sa_jax, "perplexity", scored)
  for dtype in ("float32", "bfloat16"):
    assert main(["perplexity", str(folder), str(text), "--length", "6", "--dtype", dtype]) == 0
  assert used == {"float32": "highest", "bfloat16": jax.config.jax_default_matmul_precision}
  assert used["bfloat16"] != "highest"


def test_float32_products_are_not_tuned_for_minutes(monkeypatch):
  """XLA's flags of a process: the user's own, and one more where products are exact, unless it is among them."""
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  for name in ("freeze", "set_threshold"):
    monkeypatch.setattr(gc, name, lambda *_: None)
  ours = "--xla_gpu_enable_triton_gemm=false"
  for exact, before, after in (
    (False, "--a=1", "--a=1"),
    (True, "--a=1", f"--a=1 {ours}"),
    (True, "--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
  ):
    monkeypatch.setenv("XLA_FLAGS", before)
    own(exact=exact, cache=False)
    assert os.environ["XLA_FLAGS"] == after


def test_convert_and_cost(folder, expected, tmp_path, capsys):
  checkpoint, out = tmp_path / "checkpoint", tmp_path / "out.json"
  assert main(["convert", str(folder), str(checkpoint), "--plan", PLAN, "--dtype", "float32"]) == 0
  model, params = sa_jax.from_pretrained(checkpoint)
  assert str(model.plan) == PLAN
  logits = model.apply({"params": params}, expected["input_ids"])
  np.testing.assert_allclose(logits, expected["logits_unpadded"], atol=1e-4)
  assert main(["cost", str(checkpoint), "--plan", PLAN, "--batch-size", "2", "--length", "64", "--json", str(out)]) == 0
  costs = json.loads(out.read_text())
  assert costs["shared"]["kv_cache_bytes"] == 2 * 64 * (8 + 4) * 2 * 8 * 4
  assert "-25.0 %" in capsys.readouterr().out


def test_inspect_tells_kinds_of_tensors_what_is_dropped_first(folder, capsys, monkeypatch):
  monkeypatch.setattr(console, "_width", 200)
  assert main(["convert", str(folder), "--inspect", "--plan", PLAN]) == 0
  lines = capsys.readouterr().out.splitlines()
  titles = [line.split(": ")[-1] for line in lines if line.endswith(("dropped", "used"))]
  assert titles == ["8 tensors dropped", "67 tensors used"]
  rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
  kinds = [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qk"]
  assert rows[:2] == [[kind, "4", "2-3, 5-6", "followers"] for kind in kinds]
  (queries,) = [row for row in rows[2:] if row[0] == kinds[0]]
  assert queries[1:] == ["4", "0-1, 4, 7", "64×64"]
  assert len(rows) == 2 + 9 + 3


def test_inspect_tells_kinds_of_our_own_checkpoints_too(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(console, "_width", 200)
  assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
  capsys.readouterr()
  assert main(["convert", str(tmp_path / "ours"), "--inspect", "--plan", PLAN]) == 0
  rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
  assert ["layers/*/attention/q_proj/kernel", "4", "2-3, 5-6", "followers"] in rows
  assert ["layers/*/attention/v_proj/kernel", "8", "0-7"] in [row[:3] for row in rows]


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["cost", "smollm2-135m", "--revision", "main"], "--revision main is for models on the hub, but smollm2-135m is a"),
    (["cost", "llama-2-7b", "--plan", "0:2-3"], "the followers of 0 start at 1"),
    (["cost", "llama-2-7b", "--batch-size", "0"], "--batch-size 0 (must be at least 1)"),
    (["generate", "no-such-folder", "hello"], "no-such-folder"),
    (["perplexity", "FOLDER", "no-such-text"], "cannot read no-such-text"),
    (["convert", "FOLDER", "FOLDER"], "exists already"),
    (["convert", "FOLDER"], "name the folder to write"),
    (["generate", "FOLDER", "1", "--top-k", "3"], "set a temperature above 0"),
    (["generate", "no-such-folder", "1", "--max-new-tokens", "0"], "--max-new-tokens 0 (must be at least 1)"),
    (["generate", "FOLDER"], "give at least one prompt"),
    (["generate", "FOLDER", "1", "--stop", ""], "each --stop must have text"),
    (["generate", "FOLDER", "1", "--repetition-penalty", "inf"], "must be positive and finite, not inf"),
    (["generate", "FOLDER", "1", ""], "prompts: number 2 has no tokens"),
    (["generate", "FOLDER", "--prompts", "no-such-file"], "cannot read no-such-file: No such file or directory"),
    (["chat", "FOLDER"], "this model has no chat template"),
    (["chat", "FOLDER", "--options", "thinking"], "'thinking' must look like enable_thinking=false (--options)"),
    (["generate", "FOLDER", "1", "--options", "a=1"], "--options are for the chat template: add --chat"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, arguments, says):
  assert main([str(folder) if argument == "FOLDER" else argument for argument in arguments]) == 2
  error = capsys.readouterr().err
  assert error.startswith("sa-jax: error: ")
  assert error.count("\n") == 1
  assert says in error


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["perplexity", "FOLDER", "text.txt", "--plan", "dense", "6:9"], "'6:9' goes past the model"),
    (["perplexity", "FOLDER", "text.txt", "--batch-size", "0"], "--batch-size 0 (must be at least 1)"),
    (["perplexity", "FOLDER", "numbers.jsonl"], "numbers.jsonl: line 1 is not a JSON object with a 'text'"),
    (["perplexity", "FOLDER", "text.txt", "--plan"], "--plan has no value"),
    (["analyze", "text.txt", "FOLDER", "--block", "-4"], "--block -4 (must be at least 1)"),
    (["analyze", "none.txt", "FOLDER"], "cannot read none.txt"),
    (["analyze", "text.txt", "FOLDER", "FOLDER"], "a model is listed twice"),
    (["align", "FOLDER", "dense", "text.txt"], "has no follower"),
    (["refit", "FOLDER", "6:9", "text.txt", "--out", "out"], "'6:9' goes past the model"),
    (["search", "FOLDER", "text.txt", "--budget", "99"], "99 followers are impossible"),
    (["share", "FOLDER", "text.txt", "--out", "out", "--budget", "99"], "99 followers are impossible"),
    (["demo", "--model", "FOLDER", "--plan", "dense"], "use a plan with followers"),
    (["cost", "FOLDER", "--json", "none/out.json"], "cannot write none/out.json"),
  ],
)
def test_mistakes_are_told_before_the_work_and_leave_nothing(folder, tmp_path, monkeypatch, capsys, arguments, says):
  monkeypatch.chdir(tmp_path)
  Path("text.txt").write_text("1 2 3 4")
  Path("numbers.jsonl").write_text('{"text": 3}')
  monkeypatch.setattr("sa_jax.from_pretrained", lambda *given, **named: pytest.fail("the model was opened"))
  assert main([str(folder) if argument == "FOLDER" else argument for argument in arguments]) == 2
  said = capsys.readouterr()
  assert says in said.err
  assert not said.out
  assert sorted(os.listdir()) == ["numbers.jsonl", "text.txt"]


@pytest.mark.parametrize("revision", [[], ["--revision", "main"]])
def test_a_name_that_is_no_model_is_told_what_it_could_be(capsys, revision):
  assert main(["cost", "smollm2-135", *revision]) == 2
  subject, preset, file = capsys.readouterr().err.splitlines()
  assert subject == "sa-jax: error: the model 'smollm2-135' cannot be opened:"
  known = "gpt-oss-20b, llama-2-13b, llama-2-7b, llama-3-8b, mixtral-8x7b, smollm2-135m"
  assert preset.startswith(f"  it is not a preset ({known}); did you mean smollm2-135m")
  assert file == "  there is no file or folder smollm2-135, and it is not a hub id (org/model)"


def test_bad_usage_is_exit_code_2(capsys):
  with pytest.raises(SystemExit) as stopped:
    main(["cost"])
  assert stopped.value.code == 2
  assert "model" in capsys.readouterr().err.lower()
  assert main(["cost", "--lenght", "64"]) == 2  # not: there is no model
  assert "cost has no flag --lenght; did you mean --length" in capsys.readouterr().err
  assert main(["cost", "llama-2-7b", "--no-such-flag=3"]) == 2
  assert "cost has no flag --no-such-flag" in capsys.readouterr().err


def test_errors_in_a_terminal_are_broken_between_words(monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  monkeypatch.setenv("COLUMNS", "60")
  assert main(["cost", "llama2-7b", "--plan", "26:27-30"]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) > 2
  assert max(map(len, lines)) <= 60
  assert all(line.startswith("  ") for line in lines[1:])
