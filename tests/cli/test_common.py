"""What the commands share: tables, numbers, names, and the picture of a plan."""

import pytest

import sa_jax
from sa_jax.cli import main
from sa_jax.cli.common import change, console, plans_asked, show_table
from sa_jax.cli.demo import picture
from sa_jax.display import quantity


def test_picture_of_a_plan():
  dots, numbers, _ = picture(sa_jax.SharingPlan.parse("1:2-3,5:6", 7)).splitlines()
  assert dots == "  ● ●─○─○ ● ●─○"
  assert numbers.split() == ["0", "5"]
  assert dots.index("●", 12) == numbers.index("5")


@pytest.mark.parametrize(
  ("value", "unit", "text"),
  [(0, "", "0"), (999, "B", "999 B"), (13_476_000_000, "B", "13.5 GB"), (1_234, "", "1.23 k"), (999_900, "", "1.00 M")],
)
def test_quantities(value, unit, text):
  assert quantity(value, unit) == text


def test_changes():
  assert (change(90, 100), change(1, 1), change(107.8, 100)) == ("-10.0 %", "=", "+7.8 %")


def test_names_are_printed_as_they_are(tmp_path, capsys):
  """Not as markup or emoji, which they may look like."""
  assert main(["doctor", str(tmp_path / "[bold] :smile:")]) == 0
  assert f"storage {tmp_path}/[bold] :smile:: does not exist yet, and can be made in {tmp_path}, " in (
    capsys.readouterr().out
  )


@pytest.mark.parametrize("width", [30, 40, 80])
def test_a_terminal_is_never_too_narrow_for_a_number(width, monkeypatch, capsys):
  monkeypatch.setattr(console, "width", width)
  columns = ["", "dense", "8:9", "change"]
  show_table("cost", columns, [["bytes read by a decode step", "134.52 MB", "130.00 MB", "-3.4 %"]])
  said = capsys.readouterr().out
  assert all(number in said for number in ("134.52 MB", "130.00 MB", "-3.4 %")) or width == 80
  assert all(number in said for number in ("134.52", "130.00", "-3.4"))
  assert ("│" in said) == (width == 80)


@pytest.mark.parametrize(("words", "plans"), [((), (None,)), (("None",), (None,)), (("2:3", "None"), ("2:3", None))])
def test_none_among_plans_is_the_models_own(words, plans):
  assert plans_asked(words) == plans
