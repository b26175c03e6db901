"""Files: whole or not at all, and errors that name them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa_jax.errors import UserError
from sa_jax.files import (
  check_absent,
  check_folder,
  check_writable,
  make_folder,
  named,
  new_file,
  new_folder,
  read_text,
  write_text,
)


def test_what_the_system_refuses_names_the_file(tmp_path):
  (tmp_path / "binary").write_bytes(b"\xff\xfe")
  (tmp_path / "file").write_text("")
  for refused, message in (
    (lambda: read_text(tmp_path / "none"), f"cannot read {tmp_path / 'none'}: No such file or directory"),
    (lambda: read_text(tmp_path), f"cannot read {tmp_path}: Is a directory"),
    (lambda: read_text(tmp_path / "binary"), "is not UTF-8 text: invalid start byte at byte 0"),
    (lambda: write_text(tmp_path, ""), f"cannot write {tmp_path}: it is a folder"),
    (lambda: write_text(tmp_path / "no" / "a", ""), f"cannot write {tmp_path / 'no' / 'a'}: No such file or directory"),
    (lambda: check_writable(tmp_path / "no" / "a"), f"cannot write {tmp_path / 'no' / 'a'}: No such file"),
    (lambda: check_writable(tmp_path), "it is a folder"),
    (lambda: make_folder(tmp_path / "file"), f"cannot make the folder {tmp_path / 'file'}: File exists"),
    (lambda: check_folder(tmp_path / "file"), f"cannot make the folder {tmp_path / 'file'}: it is a file"),
    (lambda: check_absent(tmp_path / "file"), "exists already"),
    (lambda: check_absent(tmp_path / "file" / "b"), f"{tmp_path / 'file'} is not a folder"),
  ):
    with pytest.raises(UserError) as caught:
      refused()
    assert message in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
  path = tmp_path / "a"

  def half():
    with new_file(path) as file:
      file.write_text("half")
      raise OSError(28, os.strerror(28), str(file))

  with pytest.raises(UserError, match=f"cannot write {path}: No space left on device$"):
    half()
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(UserError, match=r"No such file or directory \(/elsewhere/b\)"), named(path, "write"):
    raise FileNotFoundError(2, os.strerror(2), "/elsewhere/b")


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
  (tmp_path / "real").write_text("old")
  link = tmp_path / "link"
  link.symlink_to("real")

  def half():
    with new_file(link) as file:
      file.write_text("half")
      raise RuntimeError

  with pytest.raises(RuntimeError):
    half()
  assert link.read_text() == "old"
  write_text(link, "new")
  assert link.is_symlink()
  assert (tmp_path / "real").read_text() == "new"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_devices_are_written_as_they_are():
  write_text(Path(os.devnull), "gone")
  check_writable(Path(os.devnull))


def test_what_a_killed_process_left_goes_and_a_living_one_is_not_disturbed(tmp_path):
  out = tmp_path / "o[u]t"
  code = (
    "import sys, pathlib; from sa_jax.files import new_folder\n"
    "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n  (folder / 'a').write_text('a')\n"
    "  print('filled', flush=True); sys.stdin.read()"
  )
  other = subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert other.stdout.readline() == b"filled\n"
  with pytest.raises(UserError, match="another process is writing"), new_folder(out):
    pass
  other.kill()
  other.communicate()
  assert len(list(tmp_path.iterdir())) == 1
  with new_folder(out) as folder:
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
  assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_a_killed_process_left_of_a_file_goes_too(tmp_path):
  out = tmp_path / "a.txt"
  code = (
    "import sys, pathlib; from sa_jax.files import new_file\n"
    "with new_file(pathlib.Path(sys.argv[1])) as file:\n  file.write_text('half')\n"
    "  print('filled', flush=True); sys.stdin.read()"
  )
  other = subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert other.stdout.readline() == b"filled\n"
  write_text(out, "of the second")  # a file that is still being written stays
  assert len(list(tmp_path.iterdir())) == 2
  other.kill()
  other.communicate()
  write_text(out, "new")
  assert [path.name for path in tmp_path.iterdir()] == [out.name]
  assert out.read_text() == "new"


def test_full_disks_are_known_by_what_other_libraries_say(tmp_path):
  class RustError(Exception):
    pass

  with pytest.raises(UserError, match=f"^cannot write {tmp_path}: No space left on device$"), named(tmp_path, "write"):
    raise RustError("Error while serializing: I/O error: No space left on device (os error 28)")
  with pytest.raises(RustError, match="shape"), named(tmp_path, "write"):
    raise RustError("a fault of shape")
