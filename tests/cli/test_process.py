"""What holds for a command's whole process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

import sa_jax
from sa_jax import cli
from sa_jax.bench import task
from sa_jax.cli import common, process
from sa_jax.cli.train import Train
from sa_jax.distributed import Hosts
from sa_jax.train import DataConfig, TrainConfig, loop


@pytest.fixture
def unchanged():
  """JAX's settings and its cache, as they were before the test."""
  names = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
  )
  kept = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in kept.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_programs_are_kept_in_the_users_cache_and_bounded(monkeypatch, tmp_path, unchanged):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv(process.CACHE_VARIABLE, raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  compilation_cache.reset_cache()
  folder = process.keep_compiled()
  assert folder == tmp_path / "sa_jax" / "compiled"
  assert 0 < jax.config.jax_compilation_cache_max_size < 10_000_000_000
  jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.arange(5.0))
  assert any(file.name.endswith("-cache") for file in folder.iterdir())


@pytest.mark.parametrize(
  ("variables", "folder"),
  [
    ({process.CACHE_VARIABLE: "off"}, None),
    ({"JAX_COMPILATION_CACHE_DIR": "/theirs"}, None),
    ({process.CACHE_VARIABLE: "/proc/not/writable"}, None),
    ({process.CACHE_VARIABLE: "HERE/mine"}, "mine"),
  ],
)
def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path, unchanged, variables, folder):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value.replace("HERE", str(tmp_path)))
  before = jax.config.jax_compilation_cache_dir
  assert process.keep_compiled() == (None if folder is None else tmp_path / folder)
  assert folder is not None or jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
@pytest.mark.parametrize("words", [["cost", "smollm2-135m"], ["--help"]])
def test_a_pipe_that_nobody_reads_ends_it_with_141(words):
  reading, writing = os.pipe()
  os.close(reading)
  command = [sys.executable, "-c", "import sys; from sa_jax.cli import main; sys.exit(main())", *words]
  found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
  os.close(writing)
  assert (found.stderr, found.returncode) == ("", 141)


def test_a_numpy_of_the_current_folder_is_not_run(monkeypatch, tmp_path):
  """By the process that bench starts, whose interpreter is asked the same way."""
  (tmp_path / "numpy.py").write_text("raise SystemExit('foreign')")
  monkeypatch.chdir(tmp_path)
  asked = []

  def run(command, **_):
    asked.append(command)
    return subprocess.CompletedProcess(command, 1, "", "stopped")

  with monkeypatch.context() as patched:
    patched.setattr(subprocess, "run", run)
    with pytest.raises(ValueError, match="stopped"):
      task.run_task(task.Task("decode", "smollm2-135m"))
  (command,) = asked
  flags = command[: command.index("-m")]
  probe = subprocess.run([*flags, "-c", "import numpy"], capture_output=True, text=True, check=False)
  assert (probe.returncode, probe.stderr) == (0, "")
  assert subprocess.run([sys.executable, "-c", "import numpy"], capture_output=True, check=False).returncode == 1


def test_versions(capsys):
  assert cli.main(["--version"]) == 0
  said = capsys.readouterr().out
  assert said.startswith(f"sa-jax {sa_jax.__version__} (jax ")
  assert f"jax {jax.__version__}" in said


def test_options_before_the_command(capsys):
  assert cli.main(["--no-compilation-cache", "cost", "smollm2-135m"]) == 0
  assert "parameters" in capsys.readouterr().out
  assert os.environ.get("JAX_COMPILATION_CACHE_DIR") is None


@pytest.mark.parametrize(("process", "printed"), [(0, "read\nsaved: model\n"), (1, "")])
def test_of_several_processes_the_first_alone_tells_of_training(process, printed, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_index", lambda: process)
  monkeypatch.setattr(common.console, "quiet", False)

  def trains(config, *, say, console):
    say("read")
    return SimpleNamespace(interrupted=False, model="model")

  monkeypatch.setattr(loop, "train", trains)
  config = TrainConfig(out=tmp_path / "run", preset="smollm2-135m", data=DataConfig(train=(tmp_path / "text.txt",)))
  Train(config, Hosts()).run()
  assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_a_program_is_the_same_in_every_process(tmp_path):
  """Python orders sets of texts anew in each: what depends on that is compiled each time."""
  code = """
import jax, sys
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
import sa_jax
from sa_jax.decode import Settings, stream
from tests import tiny
model = tiny.model("0:1", num_layers=2)
assert len(list(stream(model, tiny.params(model), [1, 2, 3], Settings(3)))) == 2
"""
  kept = []
  for seed in ("1", "2"):
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    kept.append({file.name for file in tmp_path.iterdir() if file.name.endswith("-cache")})
  assert kept[0] == kept[1]
  assert any(name.startswith("jit_admit") for name in kept[0])
