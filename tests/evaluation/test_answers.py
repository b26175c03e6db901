"""Answers that are kept: each once, whatever ended the run before."""

import pytest

import sa_jax
from sa_jax.evaluation.answers import Answers, Request, fingerprint
from tests.formats.test_full_disk import full

MODEL = {"model": "a"}


def ask(count, task="task", **settings):
  return [Request("generate_until", (f"{number}", settings), task) for number in range(count)]


def test_a_full_disk_loses_no_answer_that_was_kept(tmp_path):
  say = lambda numbers: ["word" * 20 for _ in numbers]
  path = tmp_path / "kept.jsonl"
  Answers(path, MODEL).answer(ask(2), say)
  with full(1000), pytest.raises(sa_jax.UserError, match=r"kept\.jsonl: File too large$"):
    Answers(path, MODEL).answer(ask(20), say)
  again = Answers(path, MODEL)
  assert 2 <= len(again) < 20
  assert again.answer(ask(20), say) == ["word" * 20] * 20
  assert len(Answers(path, MODEL)) == 20


def test_a_request_is_asked_once_in_all_tasks_and_a_sampled_one_each_time(tmp_path):
  answers = Answers(tmp_path / "kept.jsonl", MODEL)
  asked = []
  say = lambda numbers: asked.extend(numbers) or [str(number) for number in numbers]
  assert answers.answer([*ask(2, "one"), *ask(3, "two")], say) == ["0", "1", "0", "1", "4"]
  assert asked == [0, 1, 4]
  sampled = ask(1, do_sample=True) * 3
  assert answers.answer(sampled, say) == ["0", "1", "2"]
  assert answers.answer(sampled, lambda numbers: 1 / 0) == ["0", "1", "2"]
  likely = [Request("loglikelihood", ("a", "b"), "task")]
  assert answers.answer(likely, lambda numbers: [(-1.5, True)]) == [(-1.5, True)]
  assert Answers(answers.path, MODEL).answer(likely, lambda numbers: 1 / 0) == [(-1.5, True)]


def test_what_a_kill_left_of_the_first_line_is_nothing_and_another_model_is_refused(tmp_path):
  path = tmp_path / "kept.jsonl"
  path.write_text('{"mod')
  assert Answers(path, MODEL).answer(ask(1), lambda numbers: ["a"]) == ["a"]
  assert len(Answers(path, MODEL)) == 1
  with pytest.raises(sa_jax.UserError, match="does not contain answers of"):
    Answers(path, {"model": "b"})


def test_fingerprints_are_of_what_files_hold(tmp_path):
  def folder(name, **files):
    (tmp_path / name).mkdir()
    for file, text in files.items():
      (tmp_path / name / file).write_text(text)
    return fingerprint(tmp_path / name)

  assert folder("a", x="1", y="2") == folder("b", x="1", y="2")
  assert len({fingerprint(tmp_path / "a"), folder("c", x="2", y="1"), folder("d", x="1", z="2")}) == 3
  parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
  for part in parts:
    part.write_text("part")
  before = fingerprint(parts[0])
  parts[1].write_text("other")
  assert fingerprint(parts[0]) != before
