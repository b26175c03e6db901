"""The command line's flags, as people's scripts have them: a change is seen here, and told in the CHANGELOG."""

import re
from pathlib import Path

import pytest

from sa_jax import cli
from sa_jax.cli.flags import fields_of

FROZEN = Path(__file__).with_name("flags.txt")


def test_flags_are_those_that_were_told():
  """To change them: write what this finds into flags.txt."""
  commands = cli._commands()
  found = [f"{name}: {' '.join(sorted(fields_of(command)))}" for name, command in sorted(commands.items())]
  assert found == FROZEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("given", [["--minutes", "2"], ["--minutes=None"], []])
def test_one_word_or_none_is_told_as_the_word(capsys, given):
  with pytest.raises(SystemExit):
    cli.main(["train", "--help"])
  shown = capsys.readouterr().out
  assert "{None}" not in shown
  assert all(f"--{flag} " in shown for flag in ("minutes FLOAT", "plan STR", "profile FIRST LAST", "cache PATH"))
  config = cli._parse(cli._commands(), ["train", "--out", "x", "--preset", "smollm2-135m", *given]).config
  assert config.log.minutes == (2.0 if "2" in given else None)
  assert config.log.profile is None


def test_profiles_are_two_numbers_or_none():
  parse = lambda *given: cli._parse(cli._commands(), ["train", "--out", "x", "--preset", "smollm2-135m", *given]).config
  assert parse("--profile", "2", "4").log.profile == (2, 4)
  assert parse("--profile", "None").log.profile is None


def test_one_thing_has_one_name():
  """Rows, tokens a row and the plan are spelt alike wherever there is such a flag."""
  others = {"batch", "rows_at_once", "seq_len", "seq_length", "context", "sharing", "model_path", "output"}
  for name, command in cli._commands().items():
    assert not fields_of(command).keys() & others, name


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", list(cli._COMMANDS))
def test_help_is_plain_and_fits_the_width(capsys, monkeypatch, command, columns):
  monkeypatch.setenv("COLUMNS", str(columns))
  with pytest.raises(SystemExit):
    cli.main([command, "--help"])
  shown = capsys.readouterr().out
  assert max(map(len, shown.splitlines())) <= columns
  assert "(default: )" not in shown
  assert "``" not in shown
  headings = re.findall(r"╭─ (.*?) ─", shown)
  assert headings
  assert not any(re.search(r"[._]|opening|cutting|settings|config|hosts|how ", heading) for heading in headings)


def test_several_required_positionals_are_required_in_the_help(capsys):
  with pytest.raises(SystemExit):
    cli.main(["search", "--help"])
  shown = " ".join(capsys.readouterr().out.replace("│", "").split())
  assert "all have equal weight. (required)" in shown
  assert "must stay anchors. (default: none)" in shown


def test_a_script_for_completion_is_not_wrapped(capsys, monkeypatch):
  said = []
  for columns in ("60", "200"):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
      cli.main(["cost", "--tyro-print-completion", "bash"])
    said.append(capsys.readouterr().out)
  assert said[0] == said[1]
  assert "complete " in said[0]
