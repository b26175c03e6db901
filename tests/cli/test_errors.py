"""What the command line says of mistakes, and of faults of ours."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sa_jax import UserError, cli
from sa_jax.cli import cost
from sa_jax.cli.flags import explain, fields_of
from sa_jax.cli.opening import check_range
from sa_jax.cli.train import command


def test_flags_are_those_of_nested_dataclasses_too():
  fields = fields_of(command)
  assert {"model", "mode", "batch_size", "learning_rate", "too_long", "skip_bad", "multihost"} <= fields.keys()
  assert "config" not in fields


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("`mode=distill` needs a checkpoint (`model`)", "--mode distill needs a checkpoint (--model)"),
    ("batch_size=0 (must be at least 1)", "--batch-size 0 (must be at least 1)"),
    ("mode='s f t' (must be sft)", "--mode 's f t' (must be sft)"),
    ("batch_size must be at least 1", "--batch-size must be at least 1"),
    ("`skip_bad=True` leaves them out, `skip_bad=False` none", "--skip-bad leaves them out, --no-skip-bad none"),
    # Neither words, nor paths, nor what is no flag.
    ("the model in /a/batch_size/b.txt and batch_size.txt", "the model in /a/batch_size/b.txt and batch_size.txt"),
    ("`other` and other_field=3", "`other` and other_field=3"),
    ("the mesh 'model=8,mode=2' is not", "the mesh 'model=8,mode=2' is not"),
  ],
)  # fmt: skip
def test_fields_are_told_as_flags(text, shown):
  assert explain(text, {"mode", "model", "batch_size", "skip_bad"}) == shown


def test_faults_stand_one_a_line(capsys):
  assert cli.main(["bench", "step", "--batch-size", "0", "--length", "0", "--model", "smollm2-135m"]) == 2
  error = capsys.readouterr().err.splitlines()
  assert error[0].startswith("sa-jax: error: bench")
  assert all(
    word in "\n".join(error) for word in ("--batch-size 0 (must be at least 1", "--length 0 (must be at least 1")
  )


def test_more_rows_than_any_device_has_room_for_are_refused_at_once(capsys):
  assert cli.main(["bench", "decode", "--model", "smollm2-135m", "--batch-size", "99999999999"]) == 2
  assert "--batch-size 99999999999" in capsys.readouterr().err


def test_contradicting_settings_are_told_as_flags(capsys):
  assert cli.main(["train", "--out", "x", "--preset", "smollm2-135m", "--mode", "distill", "--gradual-steps", "3"]) == 2
  assert capsys.readouterr().err.splitlines() == [
    "sa-jax: error: training:",
    "  --mode distill needs a checkpoint (--model), whose dense model is the teacher",
    "  --gradual-steps needs a checkpoint (--model) with the followers' own weights",
  ]


@pytest.mark.parametrize("fault", [ValueError("Incompatible shapes"), OSError("unexpected"), KeyError("a")])
def test_faults_of_ours_keep_their_traceback(monkeypatch, fault):
  def fail(self):
    raise fault

  monkeypatch.setattr(cost.CostOf, "run", fail)
  with pytest.raises(type(fault)) as caught:
    cli.main(["cost", "smollm2-135m"])
  assert caught.value is fault


@pytest.mark.parametrize(
  "fault",
  [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 97 bytes.\nmore"), MemoryError("97")],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, fault):
  def fail(self):
    raise fault

  monkeypatch.setattr(cost.CostOf, "run", fail)
  assert cli.main(["cost", "smollm2-135m"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(r"not enough memory \(.*97.*\); use shorter rows", line)


def test_a_level_that_there_is_not_is_one_line(monkeypatch, capsys):
  monkeypatch.setenv("SA_JAX_LOG", "foo")
  assert cli.main(["cost", "smollm2-135m"]) == 2
  assert capsys.readouterr().err.splitlines() == [
    "sa-jax: error: SA_JAX_LOG=foo is not a log level; use DEBUG, INFO, WARNING or ERROR"
  ]


@pytest.mark.parametrize(
  ("arguments", "offered"),
  [
    (["generat", "model", "hello"], "there is no command 'generat'; choose from demo, .*; did you mean generate"),
    (["cost", "smollm2-135"], "did you mean smollm2-135m"),
    (["bench", "decode", "--model", "llama3-8b"], "did you mean llama-3-8b"),
    (["cost", "LLAMA-3-8B"], "did you mean llama-3-8b"),
    (["bench", "train", "--attention", "chunkd"], "one of auto, .*chunked; did you mean chunked"),
    (["perplexity", "--nojson"], r"no flag --nojson; did you mean --json\?;"),
    (["train", "--mesh", "data=2", "fsdp=4"], "join mesh sizes with commas: --mesh data=2,fsdp=4"),
    (["fit", "--mesh=data=2,", "fsdp=4", "smollm2-135m"], "join mesh sizes with commas: --mesh data=2,fsdp=4"),
  ],
)
def test_near_names_are_offered(capsys, arguments, offered):
  assert cli.main(arguments) == 2
  assert re.search(offered, capsys.readouterr().err)


def test_mistakes_are_caught(monkeypatch, capsys):
  def fail(self):
    raise UserError.of("thing", ["one", "two"])

  monkeypatch.setattr(cost.CostOf, "run", fail)
  assert cli.main(["cost", "smollm2-135m"]) == 2
  assert capsys.readouterr().err == "sa-jax: error: thing:\n  one\n  two\n"


_PROCESS = """
import os, signal, sys
from sa_jax.cli import cost, main
def run(self):
  os.environ["SHOWN"] = os.environ.get("XLA_FLAGS", "")
  {body}
cost.CostOf.run = run
sys.argv = ["sa-jax", "cost", "smollm2-135m"]
sys.exit(main())
"""


@pytest.mark.parametrize(
  ("body", "code", "says"),
  [
    ("pass", 0, ""),
    ("raise ValueError('Incompatible shapes')", 1, "Traceback"),
    ("raise KeyboardInterrupt", 130, ""),
    ("raise ImportError('tensorstore') from KeyboardInterrupt()", 130, ""),  # of C code that was interrupted
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
  ],
)
def test_exit_codes(body, code, says):
  done = subprocess.run([sys.executable, "-c", _PROCESS.format(body=body)], capture_output=True, text=True, check=False)
  assert done.returncode == code
  assert says in done.stderr
  assert ("Traceback" in done.stderr) == (code == 1)


@pytest.fixture
def interleaved(tmp_path):
  """A GPT-NeoX, whose files have queries, keys and values in one tensor, before any weight is read."""
  sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
  values = {"model_type": "gpt_neox", "num_attention_heads": 4, "max_position_embeddings": 64, **sizes}
  (tmp_path / "config.json").write_text(json.dumps(values))
  return tmp_path


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["refit", "1:2", "--value-dim", "4"], "gpt_neox: .* between queries and keys: they cannot be narrower"),
    (["share", "--budget", "kv=75%", "--allow", "sharing", "values"], "gpt_neox: .* they cannot be narrower"),
    (["refit", "1:2", "--value-dim", "9"], r"--value-dim 9 \(must be less than the model's 8\)"),
    (
      ["share", "--budget", "ppl=2", "--excluded", "1", "2", "3"],
      r"every layer that could is excluded \(see --excluded\)",
    ),
    (["share", "--plan", "1:2", "--allow", "int8"], "--plan fixes what is shared, and --allow what to search"),
    (["share", "--plan", "zoo:8", "--budget", "kv=80%"], "--plan fixes what is shared, and --budget what to search"),
  ],
)
def test_what_no_checkpoint_can_hold_is_refused_before_any_work(interleaved, capsys, monkeypatch, arguments, message):
  monkeypatch.setattr("sa_jax.cli.opening.Opening.tokenizer", lambda *_: pytest.fail("the work began"))
  command, plan = arguments[0], [each for each in arguments[1:2] if not each.startswith("--")]
  flags = arguments[1 + len(plan) :]
  assert cli.main([command, str(interleaved), *plan, "text.txt", "--out", str(interleaved / "out"), *flags]) == 2
  assert re.search(message, capsys.readouterr().err)


def test_numbers_beyond_float16_are_refused():
  """They would be stored as infinite: a model that was measured well, and is broken on disk."""
  params = {"mlp": {"kernel": jnp.float32([[1.0, -7e4], [2.0, 3.0]])}, "norm": jnp.float32([65504.0])}
  check_range(params, "bfloat16")
  with pytest.raises(UserError, match=r"^float16 ends at 65,504; .*: mlp/kernel has numbers up to 7e\+04$"):
    check_range(params, "float16")
