"""The command line's flags, as people's scripts have them: a change is seen here, and told in the CHANGELOG."""

from pathlib import Path

from sa_jax import cli
from sa_jax.cli.flags import fields_of

FROZEN = Path(__file__).with_name("flags.txt")


def test_flags_are_those_that_were_told():
  """To change them: write what this finds into flags.txt."""
  commands = cli._commands()
  found = [f"{name}: {' '.join(sorted(fields_of(command)))}" for name, command in sorted(commands.items())]
  assert found == FROZEN.read_text(encoding="utf-8").splitlines()


def test_one_thing_has_one_name():
  """Rows, tokens a row and the plan are spelt alike wherever there is such a flag."""
  others = {"batch", "rows_at_once", "seq_len", "seq_length", "context", "sharing", "model_path", "output"}
  for name, command in cli._commands().items():
    assert not fields_of(command) & others, name
