"""analyze, search, align, refit and share, from files to files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import sa_jax
from sa_jax.cli import main
from sa_jax.cli.opening import Opening
from sa_jax.cli.texts import RowLength, read_documents, split_texts

pytestmark = pytest.mark.slow

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "llama-gqa-8l"
SIZES = ["--length", "12", "--calibration-rows", "4", "--judging-rows", "2"]


@pytest.fixture
def folder(tmp_path):
  """A model whose tokens are numbers, and two texts of them."""
  model = tmp_path / "model"
  model.mkdir()
  for name in ("config.json", "model.safetensors"):
    shutil.copy(REFERENCE / name, model)
  size = json.loads((model / "config.json").read_text())["vocab_size"]
  tokenizer = Tokenizer(WordLevel({str(token): token for token in range(size)}, unk_token="0"))
  tokenizer.pre_tokenizer = Whitespace()
  tokenizer.save(str(model / "tokenizer.json"))
  rng = np.random.default_rng(0)
  words = lambda: " ".join(map(str, rng.integers(0, size, 200)))
  (tmp_path / "one.txt").write_text(words())
  (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"text": words()}) for _ in range(2)))
  return tmp_path


def test_share_saves_the_model_that_it_measured(folder, capsys):
  texts = [folder / "one.txt", folder / "two.jsonl"]
  (folder / "model" / "generation_config.json").write_text("{}")
  arguments = ["share", str(folder / "model"), *map(str, texts), "--out", str(folder / "shared")]
  arguments += ["--budget", "3", "--local-epochs", "0", *SIZES]
  assert main([*arguments, "--dtype", "float32", "--json", str(folder / "share.json")]) == 0
  numbers = json.loads((folder / "share.json").read_text())
  model, params = sa_jax.from_pretrained(folder / "shared")
  assert str(model.plan) == numbers["plan"]
  assert len(model.plan.followers) == 3
  said, told = capsys.readouterr()
  assert f"plan (anchor:followers): {numbers['plan']}\n" in said
  assert f"try it: sa-jax generate {folder / 'shared'} " in said
  assert "reading the texts: compiling first" in told
  assert "about 0 s" not in said
  for text in split_texts(sa_jax.load_tokenizer(folder / "model"), texts, RowLength(12), 4, 2):
    want = numbers["perplexity"][text.name]["shared"]
    assert sa_jax.perplexity(model, params, text.judging, batch_size=2).perplexity == pytest.approx(want, rel=1e-4)
  assert main(arguments) == 2  # the folder exists
  written = (folder / "shared" / "README.md").read_text()
  assert f"`{numbers['plan']}`" in written
  for values in numbers["perplexity"].values():
    assert f"| {values['dense']:.3f} | {values['shared']:.3f} |" in written
  # Commands that only read it take its own plan, and all that travels with a model is there.
  own = folder / "own.json"
  assert main(["perplexity", str(folder / "shared"), str(texts[0]), "--length", "12", "--json", str(own)]) == 0
  assert list(json.loads(own.read_text())) == [numbers["plan"]]
  assert main(["cost", str(folder / "shared"), "--json", str(own)]) == 0
  assert json.loads(own.read_text())["plan"] == numbers["plan"]
  assert (folder / "shared" / "generation_config.json").read_text() == "{}"


def test_the_card_is_in_the_folder_before_that_appears(folder, monkeypatch):
  """A kill leaves no folder without its card, which a second run would not write."""
  seen = []

  def stop(checkpointer, path, *_):
    seen.append((path.parent / "README.md").read_text())
    raise KeyboardInterrupt

  monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", stop)
  model, params = sa_jax.from_pretrained(folder / "model", layout="layers")
  with pytest.raises(KeyboardInterrupt):
    Opening().save(folder / "out", folder / "model", model, params, "float32", "the card")
  assert seen == ["the card"]
  assert not list(folder.glob("*out*"))


def test_share_takes_a_plan_and_distils(folder):
  arguments = ["share", str(folder / "model"), str(folder / "one.txt"), "--out", str(folder / "shared"), *SIZES]
  arguments += ["--dtype", "float32", "--json", str(folder / "share.json"), "--effort", "quick"]
  assert main([*arguments, "--plan", "1:2,4:5-6", "--distill-minutes", "0.02", "--plot", str(folder / "p.png")]) == 0
  assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
  numbers = json.loads((folder / "share.json").read_text())
  assert numbers["plan"] == "1:2,4:5-6" == str(sa_jax.from_pretrained(folder / "shared")[0].plan)
  assert numbers["perplexity"]["one"]["shared"] <= numbers["perplexity"]["one"]["undistilled"]
  assert "distillation" in (folder / "shared" / "README.md").read_text()
  assert main([*arguments, "--out", str(folder / "other"), "--plan", "zoo:8"]) == 2


def test_search_writes_its_front_and_resumes(folder):
  arguments = ["search", str(folder / "model"), str(folder / "one.txt"), "--budget", "kv=90%", "--strategy", "greedy"]
  arguments += [*SIZES, "--shortlist", "2", "--record", str(folder / "record.json"), "--out", str(folder / "out")]
  assert main([*arguments, "--json", str(folder / "search.json")]) == 0
  numbers = json.loads((folder / "search.json").read_text())
  plan = sa_jax.SharingPlan.parse(numbers["plan"], 8)
  assert len(plan.followers) == 2  # each saves half of a layer's cache: 1 - 2/16 is the first below 90 %
  assert tuple(numbers["shared_attention"]["source"]) == plan.source
  assert (folder / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
  measured = json.loads((folder / "record.json").read_text())["plans"]
  assert numbers["plan"] in measured


def test_align_and_refit_save_checkpoints(folder, capsys):
  model, text = str(folder / "model"), str(folder / "one.txt")
  aligned = ["align", model, "1:2-3", text, "--length", "12", "--rows", "4", "--json", str(folder / "align.json")]
  assert main([*aligned, "--kinds", "group", "--out", str(folder / "aligned")]) == 0
  said = capsys.readouterr().out
  assert "head maps: for each head of a follower" in said
  assert "perplexity on 4 rows of 12 tokens" in said
  numbers = json.loads((folder / "align.json").read_text())
  assert numbers["loss"] <= numbers["identity_loss"]
  opened, _ = sa_jax.from_pretrained(folder / "aligned")
  assert opened.plan == sa_jax.SharingPlan.parse("1:2-3", 8)  # folded
  refitted = ["refit", model, "1:2-3", text, "--length", "12", "--rows", "8", "--json", str(folder / "refit.json")]
  assert main([*refitted, "--out", str(folder / "refitted")]) == 0
  reports = json.loads((folder / "refit.json").read_text())
  assert {report["layer"] for report in reports if report["part"] == "attention"} == {2, 3}
  assert all(report["after"] <= report["before"] for report in reports)
  assert str(sa_jax.from_pretrained(folder / "refitted")[0].plan) == "1:2-3"


def test_analyze_draws_maps_and_drift(folder, capsys):
  shutil.copytree(folder / "model", folder / "later")
  arguments = ["analyze", str(folder / "one.txt"), str(folder / "model"), str(folder / "later"), "--length", "16"]
  arguments += ["--rows", "2", "--top-k", "4", "--out", str(folder / "out"), "--json", str(folder / "analysis.json")]
  assert main(arguments) == 0
  assert "top-4 (shared fraction of the 4 keys" in " ".join(capsys.readouterr().out.split())
  numbers = json.loads((folder / "analysis.json").read_text())
  assert list(numbers["drift"].values()) == [0.0, 0.0]
  mean = np.array(numbers[str(folder / "model")]["mean"]["cosine"])
  np.testing.assert_allclose(np.diag(mean), 1, atol=1e-6)
  assert {file.name for file in (folder / "out").iterdir()} == {
    "cosine.png", "cosine_without_sink.png", "js_divergence.png", "top_k_overlap.png", "drift.gif",
  }  # fmt: skip


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["--budget", "40"], "40 followers are impossible"),
    (["--length", "500", "--budget", "1"], "too few"),
    (["--budget", "much"], "'much' is none of"),
  ],
)
def test_bad_input_ends_with_one_line(folder, capsys, changes, message):
  arguments = ["share", str(folder / "model"), str(folder / "one.txt"), "--out", str(folder / "shared"), *SIZES]
  assert main([*arguments, *changes]) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("sa-jax: error: ")
  assert message in error
  assert not (folder / "shared").exists()


def test_lines_end_where_json_lines_end(tmp_path):
  """Not at every character that Unicode calls a line's end; blank ones are none."""
  file = tmp_path / "text.jsonl"
  file.write_text('{"text": "one\u2028two"}\n\n{"text": "three"}\n', encoding="utf-8")
  assert read_documents(file) == "one\u2028two\n\nthree"


def test_a_mesh_changes_no_number(folder, capsys):
  model, text = str(folder / "model"), str(folder / "one.txt")
  found, said = [], []
  for mesh in ("data=1", "fsdp=4"):
    file = folder / f"{len(found)}.json"
    assert main(["perplexity", model, text, "--length", "12", "--rows", "4", "--mesh", mesh, "--json", str(file)]) == 0
    found.append(json.loads(file.read_text())["dense"]["loss"])
    capsys.readouterr()
    assert main(["generate", model, "3 1 4", "--max-new-tokens", "4", "--mesh", mesh]) == 0
    said.append(capsys.readouterr().out.splitlines()[0])
  assert found[0] == pytest.approx(found[1], rel=1e-5)
  assert said[0] == said[1] != ""
  assert main(["generate", model, "3 1 4", "--mesh", "tensor=3"]) == 2
  assert "needs 6 devices; there are 8" in capsys.readouterr().err


def test_what_would_fail_in_the_end_fails_at_once(folder, capsys, monkeypatch):
  monkeypatch.setattr("sa_jax.cli.opening.Opening.open", lambda *_: pytest.fail("the work began"))
  model, text = str(folder / "model"), str(folder / "one.txt")
  for arguments, message in (
    (["align", model, "1:2", text, "--out", model], "exists already; name a new folder"),
    (["search", model, text, "--out", text], "cannot make the folder"),
    (["analyze", text, model, "--out", text], "cannot make the folder"),
    (["analyze", text, model, "--rows", "0", "--out", str(folder / "out")], "--rows 0 (must be at least 1)"),
  ):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_lines_without_text_are_named(tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text('{"text": "fine"}\n{"other": 1}\n')
  with pytest.raises(ValueError, match="line 2"):
    read_documents(file)


class TestEffort:
  @pytest.mark.parametrize(
    ("flags", "strategy", "reach", "rows", "excluded"),
    [
      (["--effort", "quick", "--reach", "3", "--judging-rows", "2"], "dp", 3, (8, 2), ()),
      (["--effort=quick"], "dp", 5, (8, 4), ()),
      (["--effort=quick", "--effort", "best"], "beam", 5, (176, 16), ()),
      (["--effort", "best", "--effort=quick"], "dp", 5, (8, 4), ()),
      (["--excluded", "1"], "greedy", 5, (64, 16), (1,)),  # on a CPU
      (["--effort", "best", "--calibration-rows", "9"], "beam", 5, (9, 16), ()),
    ],
  )
  def test_flags_that_are_given_come_before_it(self, flags, strategy, reach, rows, excluded):
    from sa_jax.cli import _commands, _parse

    settings = _parse(_commands(), ["share", "m", "t", "--out", "o", *flags]).settings
    assert (settings.search.strategy, settings.search.reach, settings.search.excluded) == (strategy, reach, excluded)
    assert (settings.most_rows, settings.judging_rows) == rows

  @pytest.mark.parametrize(
    ("flags", "known"),
    [
      ([], True),
      (["--budget", "4", "--judging-rows", "8"], True),
      (["--plan", "search"], False),
      (["--reach", "3"], False),
      (["--effort", "quick"], False),
      (["--record", "plans.json"], False),
    ],
  )
  def test_a_known_plan_is_taken_unless_told_how_to_search(self, flags, known):
    from sa_jax.cli import _commands, _parse

    assert _parse(_commands(), ["share", "m", "t", "--out", "o", *flags]).prefers_known_plan() == known

  def test_a_text_gives_what_it_has(self, folder):
    tokenizer = sa_jax.load_tokenizer(folder / "model")
    split = lambda *rows: split_texts(tokenizer, [folder / "one.txt"], RowLength(12), *rows)[0]
    few = split(176, 16)
    assert (len(few.calibration), len(few.judging)) == (13, 3)  # of 16 rows
    assert not (few.calibration[:, None] == few.judging[None]).all(-1).any()
    enough = split(8, 4)
    assert (len(enough.calibration), len(enough.judging)) == (8, 4)
    with pytest.raises(sa_jax.UserError, match="each text needs two rows"):
      split_texts(tokenizer, [folder / "one.txt"], RowLength(150), 8, 4)

  @pytest.mark.parametrize("effort", ["quick", "good"])
  def test_share_takes_it(self, folder, effort):
    arguments = ["share", str(folder / "model"), str(folder / "one.txt"), "--out", str(folder / "shared")]
    arguments += ["--budget", "2", "--length", "12", "--effort", effort, "--json", str(folder / "share.json")]
    assert main(arguments) == 0
    numbers = json.loads((folder / "share.json").read_text())
    assert sum(layer != source for layer, source in enumerate(numbers["shared_attention"]["source"])) == 2
    kinds = {part for each in numbers["refit"] for part in each.values() if isinstance(part, str)}
    assert any("mlp" in kind for kind in kinds) == (effort == "good"), kinds
