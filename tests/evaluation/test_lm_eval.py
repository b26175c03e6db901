"""The adapter for lm-eval against `model.apply` and lm-eval's own utilities; `sa-jax eval` without torch."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

import sa_jax
from sa_jax import cli
from sa_jax.cli.opening import Opening
from sa_jax.formats.tokenizer import Tokenizer
from tests import tiny

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sa-jax[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.utils import get_rolling_token_windows  # noqa: E402

from sa_jax.evaluation.harness import find_tasks  # noqa: E402
from sa_jax.evaluation.lm import SharedAttentionLM  # noqa: E402
from sa_jax.evaluation.settings import Limits  # noqa: E402

LONGEST = 40
TEMPLATE = "{% for m in messages %}w01 {{ m.content }} w02 {% endfor %}{% if add_generation_prompt %}w01 {% endif %}"


def tokenizer():
  """Words w00 to w60; w01 starts a text, w02 ends one."""
  backend = Backend(models.WordLevel({f"w{token:02}": token for token in range(61)}, unk_token="w00"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return Tokenizer(backend, TEMPLATE, (("bos_token", "w01"), ("eos_token", "w02")))


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1", num_layers=3, max_length=LONGEST, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def lm(model, params):
  return SharedAttentionLM(model, params, tokenizer(), limits=Limits(256, 2))


@pytest.fixture(scope="module")
def log_probs(model, params):
  """Of the token after each of a row's tokens, float64 ``[T, V]``."""
  apply = jax.jit(model.apply)

  def of(tokens):
    row = np.zeros((1, LONGEST), np.int32)
    row[0, : len(tokens)] = tokens
    return log_softmax(np.asarray(apply({"params": params}, row)[0, : len(tokens)], np.float64), axis=-1)

  return of


def words(tokens):
  return " ".join(f"w{token:02}" for token in tokens)


def instances(kind, *arguments):
  return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def score(log_probs, context, continuation):
  """Of a continuation, and whether it is the greedy one."""
  table = log_probs([*context, *continuation][:-1])[len(context) - 1 :]
  return table[np.arange(len(continuation)), continuation].sum(), (table.argmax(-1) == continuation).all()


def test_loglikelihood(lm, log_probs):
  rng = np.random.default_rng(0)
  draw = lambda low, high: rng.integers(3, 61, rng.integers(low, high)).tolist()
  pairs = [(context, draw(1, 5)) for context in (draw(5, 20), draw(5, 20)) for _ in range(3)]
  pairs += [([], draw(2, 6)), ([], [1, 5, 9]), (draw(50, 60), draw(3, 4))]
  found = lm.loglikelihood(
    instances("loglikelihood", *((words(context), (" " if context else "") + words(rest)) for context, rest in pairs))
  )
  for (context, rest), (value, greedy) in zip(pairs, found, strict=True):
    # An empty context is the start token, which is not put twice; what does not fit loses its beginning.
    context, rest = (context, rest) if context else ([1], rest[1:] if rest[0] == 1 else rest)
    want, likeliest = score(log_probs, context[-(LONGEST + 1 - len(rest)) :], rest)
    assert value == pytest.approx(want, abs=2e-5)
    assert greedy == likeliest


def test_spaces_belong_to_the_continuation(lm, log_probs):
  ((value, _),) = lm.loglikelihood(instances("loglikelihood", ("w05 w06 ", "w07")))
  assert value == pytest.approx(score(log_probs, [5, 6], [7])[0], abs=2e-5)


@pytest.mark.parametrize("length", [1, LONGEST, LONGEST + 1, 3 * LONGEST - 5])
def test_rolling_windows_are_lm_evals(lm, log_probs, length):
  text = np.random.default_rng(length).integers(3, 61, length).tolist()
  wanted = 0.0
  for read, predicted in get_rolling_token_windows(text, 1, LONGEST, 1):
    table = log_probs(read)[-len(predicted) :]
    wanted += table[np.arange(len(predicted)), predicted].sum()
  assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", (words(text),))) == [
    pytest.approx(wanted, abs=1e-4)
  ]


def test_rolling_windows_begin_with_the_start_token_that_the_tokenizer_puts_before_a_text(model, params, log_probs):
  backend = tokenizer().backend
  backend.post_processor = processors.TemplateProcessing(single="w01 $A", special_tokens=[("w01", 1)])
  lm = SharedAttentionLM(model, params, Tokenizer(backend, None, (("bos_token", "w01"), ("eos_token", "w02"))))
  text = np.random.default_rng(5).integers(3, 61, 100).tolist()
  # Windows of 39 tokens; each is read after the start token, and but for the first after the token before it.
  wanted = score(log_probs, [1], text[:39])[0] + score(log_probs, [1, text[38]], text[39:78])[0]
  # The last window is as long as the others, and of those it has in common nothing is counted twice.
  wanted += score(log_probs, [1, *text[60:78]], text[78:])[0]
  (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (words(text),)))
  assert found == pytest.approx(wanted, abs=2e-3)


def test_generation_stops_at_strings_ends_and_lengths(lm, model, params):
  rng = np.random.default_rng(3)
  prompts = [rng.integers(3, 61, length).tolist() for length in (3, 9, 14, 30)]
  alone = []
  for prompt in prompts:
    kept = prompt[-(LONGEST - 12) :]
    out = sa_jax.generate(model, params, np.array([kept]), None, 12, cache_length=64)
    alone.append(out.tokens[0, : out.lengths[0]].tolist())
  generate = lambda **settings: lm.generate_until(
    instances("generate_until", *((words(prompt), settings) for prompt in prompts))
  )
  text = lambda row: words(token for token in row)
  whole = [text(row).split("w02")[0] for row in alone]
  assert generate(until=[], max_gen_toks=12) == whole
  longest = max(range(4), key=lambda index: len(alone[index]))
  stop = f" w{alone[longest][3]:02}"
  stopped = generate(until=[stop], max_gen_toks=12)
  assert stopped == [row.split(stop)[0] for row in whole]
  assert 0 < len(stopped[longest]) < len(whole[longest])
  # Fewer new tokens leave room for more of the last prompt.
  assert generate(until=[], max_gen_toks=2)[:3] == [text(row[:2]).split("w02")[0] for row in alone[:3]]
  sampled = generate(until=[], max_gen_toks=12, do_sample=True, temperature=1.0)
  assert sampled != whole
  assert sampled == generate(until=[], max_gen_toks=12, do_sample=True, temperature=1.0)


def test_settings_are_checked(lm):
  with pytest.raises(ValueError, match="unsupported generation settings: num_beams; supported are until, max_gen_toks"):
    lm.generate_until(instances("generate_until", ("w05", {"until": [], "num_beams": 4})))
  with pytest.raises(ValueError, match="40 new tokens leave no room for a prompt in the model's context of 40"):
    lm.generate_until(instances("generate_until", ("w05", {"until": [], "max_gen_toks": LONGEST})))
  with pytest.raises(ValueError, match="a continuation of 41 tokens is longer than the model's context of 40"):
    lm.loglikelihood(instances("loglikelihood", ("w05", " " + words([3] * 41))))


def test_chat(lm):
  messages = [{"role": "user", "content": "w05"}, {"role": "assistant", "content": "w06 w07"}]
  assert lm.apply_chat_template(messages) == "w01 w05 w02 w01 w06 w07 w02 w01 "
  assert lm.apply_chat_template(messages, add_generation_prompt=False) == "w01 w05 w02 w01 w06 w07"
  assert lm.chat_template(True) == TEMPLATE
  assert lm.tokenizer_name == "sa_jax"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, params):
  """A checkpoint with its tokenizer, and two local tasks."""
  folder = tmp_path_factory.mktemp("eval")
  path = tiny.write_hf(folder / "model", tiny.model("dense", num_layers=3, max_length=LONGEST, eos_token_ids=(2,)),
                       tiny.params(tiny.model("dense", num_layers=3, max_length=LONGEST)))  # fmt: skip
  tokenizer().save(path)
  rng = np.random.default_rng(5)
  draw = lambda: words(rng.integers(3, 61, 4))
  docs = [{"question": draw(), "options": [draw(), draw()], "label": int(rng.integers(2))} for _ in range(16)]
  (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
  common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\ntest_split: test\n"
  tasks = folder / "tasks"
  tasks.mkdir()
  (tasks / "choose.yaml").write_text(
    common + "task: choose_words\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: label\n"
    "doc_to_choice: options\nmetric_list: [{metric: acc}]\n"
  )
  (tasks / "finish.yaml").write_text(
    common + "task: finish_words\noutput_type: generate_until\ndoc_to_text: '{{question}}'\n"
    "doc_to_target: '{{options[0]}}'\ngeneration_kwargs: {until: [w07], max_gen_toks: 5}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
  )
  return folder


def test_command_without_torch(folder, model, params, log_probs):
  """From files to lm-eval's results; torch is installed, and not imported; a template is compiled for all documents."""
  arguments = ["eval", str(folder / "model"), "--tasks", "choose_words", "finish_words", "--plan", "0:1"]
  arguments += ["--include-path", str(folder / "tasks"), "--limit", "4", "--dtype", "float32", "--log-samples"]
  arguments += ["--json", str(folder / "results.json"), "--output-path", str(folder / "out")]
  program = (
    "import jinja2, sys; from sa_jax.cli import main\n"
    "compiled, real = [], jinja2.Environment.compile\n"
    "jinja2.Environment.compile = lambda env, source, *rest: compiled.append(source) or real(env, source, *rest)\n"
    f"code = main({arguments!r})\n"
    "print('torch' in sys.modules, 'transformers' in sys.modules, len(compiled) - len(set(compiled))); sys.exit(code)"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
  assert done.returncode == 0, done.stderr
  assert "git" not in done.stderr  # the folder is no repository
  assert done.stdout.splitlines()[-1] == "False False 0"
  results = json.loads((folder / "results.json").read_text())
  (written,) = (folder / "out").rglob("results_*.json")
  assert json.loads(written.read_text())["results"] == results["results"]
  assert results["config"]["model_args"]["plan"] == "0:1"
  assert results["n-samples"]["choose_words"] == {"original": 16, "effective": 4}
  right = 0
  ids = lambda text: [int(word[1:]) for word in text.split()]
  dense = tiny.params(tiny.model("dense", num_layers=3, max_length=LONGEST))
  shared = sa_jax.prune(dense, model.plan)
  for sample in results["samples"]["choose_words"]:
    context = ids(sample["doc"]["question"])
    scores = []
    for option, ((found, _),) in zip(sample["doc"]["options"], sample["resps"]):
      tokens = np.array([context + ids(option)])
      logits = np.asarray(model.apply({"params": shared}, tokens[:, :-1])[0], np.float64)
      scores.append(log_softmax(logits, -1)[np.arange(3, 7), tokens[0, 4:]].sum())
      assert float(found) == pytest.approx(scores[-1], abs=2e-5)
    right += int(np.argmax(scores)) == sample["doc"]["label"]
  assert results["results"]["choose_words"]["acc,none"] == right / 4
  assert "choose_words" in done.stdout


def evaluate(folder, out, *more):
  """Results of the command on both tasks."""
  arguments = ["eval", str(folder / "model"), "--tasks", "choose_words", "finish_words", "--dtype", "float32"]
  arguments += ["--include-path", str(folder / "tasks"), "--bootstrap-iters", "0", "--json", str(out)]
  assert cli.main([*arguments, *more]) == 0
  return json.loads(out.read_text())


def test_plans_beside_dense_are_as_alone_and_differences_are_paired(folder, tmp_path, capsys):
  plans = ("dense", "0:1")
  both = evaluate(
    folder, tmp_path / "all.json", "--plan", *plans, "--log-samples", "--markdown", str(tmp_path / "t.md")
  )
  right = {}
  for plan in plans:
    alone = evaluate(folder, tmp_path / "one.json", "--plan", plan, "--log-samples")
    assert both["plans"][plan]["results"] == alone["results"]
    right[plan] = [sample["acc"] for sample in alone["samples"]["choose_words"]]
  found = {(each["plan"], each["task"]): each for each in both["differences"]}
  for plan in plans[1:]:
    apart = np.subtract(right[plan], right["dense"])
    told = found[plan, "choose_words"]
    assert told["than"] == "dense"
    assert told["paired"]
    assert told["value"] == pytest.approx(apart.mean())
    assert told["stderr"] == pytest.approx(apart.std(ddof=1) / np.sqrt(len(apart)))
  assert any(each["stderr"] for each in both["differences"])
  _, _, header, sides, *rows = (tmp_path / "t.md").read_text().splitlines()
  assert header.startswith("| task | documents | metric | plan | value")
  assert len(rows) == 4
  assert all(row.count("|") == sides.count("|") for row in rows)
  told = found["0:1", "choose_words"]
  assert f"| {told['value']:+.4f} | {told['stderr']:.4f} |" in next(
    row for row in rows if "choose_words | 16 | acc | 0:1 |" in row
  )


def test_what_has_been_answered_is_not_asked_again(folder, tmp_path, monkeypatch, capsys):
  """Not even the weights are read; what a killed run had not answered is asked, and of another plan everything."""
  kept = tmp_path / "kept"
  flags = ["--plan", "dense", "0:1", "--resume", str(kept)]
  alone = evaluate(folder, tmp_path / "a.json", *flags[:3])
  asked = []
  real = Opening.open
  monkeypatch.setattr(
    Opening, "open", lambda self, model, plan, *rest: asked.append(str(plan)) or real(self, model, plan, *rest)
  )
  first = evaluate(folder, tmp_path / "b.json", *flags)
  assert asked == ["dense", "0:1"]
  again = evaluate(folder, tmp_path / "c.json", *flags)
  assert asked == ["dense", "0:1"]
  assert "48 answers stored" in capsys.readouterr().out
  for found in (first, again):
    assert found["differences"] == alone["differences"]
    assert [each["results"] for each in found["plans"].values()] == [
      each["results"] for each in alone["plans"].values()
    ]
  torn = sorted(kept.iterdir())[0]
  whole = torn.read_text()
  torn.write_text(whole[:-30])
  assert evaluate(folder, tmp_path / "d.json", *flags)["differences"] == alone["differences"]
  assert len(asked) == 3
  lines = [json.loads(line) for line in torn.read_text().splitlines() if line.endswith("}")]
  assert [line["answer"] for line in lines[1:]] == [json.loads(line)["answer"] for line in whole.splitlines()[1:]]
  evaluate(folder, tmp_path / "e.json", *flags[:2], "0:1-2", *flags[3:])
  assert asked[3:] == ["0:1-2"]
  # The same model in another folder, and another one: a norm's scale differs.
  shutil.copytree(folder, tmp_path / "copy")
  evaluate(tmp_path / "copy", tmp_path / "f.json", *flags)
  assert len(asked) == 4
  changed = tmp_path / "copy" / "model" / "model.safetensors"
  data = bytearray(changed.read_bytes())
  data[-1] ^= 1
  changed.write_bytes(data)
  evaluate(tmp_path / "copy", tmp_path / "f.json", "--plan", "dense", "--resume", str(kept))
  assert asked[4:] == ["dense"]


def test_unknown_tasks_are_refused_with_near_names(folder, monkeypatch, capsys):
  # lm-eval's own tasks take seconds to read: pretend that it has none.
  import lm_eval.tasks

  real = lm_eval.tasks.TaskManager
  monkeypatch.setattr(
    lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: real(None, include_path, False)
  )
  with pytest.raises(
    ValueError, match=r"does not know the tasks 'chose_words' \(near names: choose_words.*\), 'zzz'; it"
  ):
    find_tasks(["chose_words", "finish_words", "zzz"], [folder / "tasks"])
  _, found = find_tasks(["*_words", "choose_words"], [folder / "tasks"])
  assert found == ["choose_words", "finish_words"]
  with pytest.raises(ValueError, match="there is no folder .*nowhere to read tasks from"):
    find_tasks(["choose_words"], [folder / "nowhere"])
  with pytest.raises(ValueError, match="at least one task is needed"):
    find_tasks([])
  assert cli.main(["eval", str(folder / "model"), "--tasks", "choose_words", "--bootstrap-iters", "-1"]) == 2
  assert "--bootstrap-iters -1 (must be 0 or more)" in capsys.readouterr().err


@pytest.mark.real_model
def test_requests_of_a_real_models_layers_equal_hflm(shallow, smollm2, tmp_path):
  """Options after a context, single letters after shared examples, two words: transformers' answers in float32.

  `experiments/direct_application/against_hflm.py` does it with all layers and 50 documents of three tasks.
  """
  transformers = pytest.importorskip("transformers")
  HFLM = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError).HFLM

  model, params = shallow
  Opening().save(tmp_path / "checkpoint", smollm2, model, params, "float32")
  sa_jax.export(tmp_path / "checkpoint", tmp_path / "hf")
  transformers.utils.logging.disable_progress_bar()
  theirs = HFLM(str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=1)
  ours = SharedAttentionLM(model, params, sa_jax.load_tokenizer(smollm2), limits=Limits(512))
  start = "A man sits on a roof. He "
  endings = ("is using wrap to wrap a pair of skis.", "starts pulling up roofing on a roof.", "is holding a cube.")
  examples = "Question: Is water wet?\nA. yes\nB. no\nAnswer: A\n\nQuestion: Is ice hot?\nA. yes\nB. no\nAnswer: B\n\n"
  questions = ("Is the sun cold?", "Is Paris in France?")
  asked = [f"{examples}Question: {question}\nA. yes\nB. no\nAnswer:" for question in questions]
  pairs = [(start.rstrip(), f" {ending}") for ending in endings]
  pairs += [(question, letter) for question in asked for letter in (" A", " B")] + [("", "The capital of France")]
  found, wanted = (lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True) for lm in (ours, theirs))
  np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], atol=1e-3)
  assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
  assert ours.prefix_token_id == theirs.prefix_token_id
  assert ours.eot_token_id == theirs.eot_token_id
  assert ours.max_length == theirs.max_length
  settings = {"until": ["Question:"], "do_sample": False, "max_gen_toks": 24}
  asked = instances("generate_until", *((question, settings) for question in asked))
  assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
