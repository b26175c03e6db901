"""Several hosts as one machine."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import inspect
import json
import socket
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import jax
import numpy as np

from sa_jax.errors import UserError
from sa_jax.nn import Transformer
from sa_jax.sharding import mesh_of
from sa_jax.trees import Params

P = ParamSpec("P")
M = TypeVar("M", bound=Transformer)
Q = TypeVar("Q", bound=Params)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Hosts:
  """How this process finds the others that train with it."""

  multihost: bool = False
  """Connect to the other processes, found from the environment on TPU pods, SLURM, Open MPI and Kubernetes."""
  coordinator: str | None = None
  """On other systems: ADDRESS:PORT of the first process."""
  processes: int | None = None
  """On other systems: number of processes."""
  process: int | None = None
  """On other systems: index of this process, from 0."""


def start(hosts: Hosts) -> None:
  """Joins the other processes, if any; must run before anything queries devices.

  Raises:
    UserError: if only some of the flags are given, or the others cannot be reached.
  """
  given = [value for value in (hosts.coordinator, hosts.processes, hosts.process) if value is not None]
  if given and len(given) < 3:
    raise UserError("`coordinator`, `processes` and `process` belong together; on a cluster `multihost` is enough")
  if not (given or hosts.multihost) or jax.distributed.is_initialized():
    return
  if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(hosts.coordinator, hosts.processes, hosts.process)
  except (RuntimeError, ValueError) as error:
    raise UserError(f"the other processes cannot be reached: {error}") from None


_PATIENCE = 50.0
"""Timeout in seconds for short work: no process waits longer than a minute."""
FOREVER = 24 * 3600.0
"""Timeout in seconds for work that may take long."""
_asked: collections.Counter[str] = collections.Counter()


def exchange(what: str, mine: str, seconds: float = _PATIENCE) -> list[str]:
  """Gathers a string from every process, in process order. All processes must call it.

  It uses the coordinator, not the devices: processes that have stopped, or make other calls, are named.

  Raises:
    UserError: if a process does not answer in time, or the processes have not joined.
  """
  if jax.process_count() == 1:
    return [mine]
  key = _key(what)
  _client().key_value_set(f"{key}/{jax.process_index()}", mine)
  return [_answer(key, process, what, seconds) for process in range(jax.process_count())]


def _key(what: str) -> str:
  """A key for this exchange: the same on all processes that have made the same number of exchanges."""
  _asked[what] += 1
  return f"sa_jax/{what}/{_asked[what]}"


def _client() -> Any:
  from jax._src import distributed  # there is no public API; Orbax and others use this

  if (client := distributed.global_state.client) is None:  # TPU hosts know of each other without it
    raise UserError(
      f"this is one of {jax.process_count()} processes, but they are not connected: call jax.distributed.initialize() "
      "first, or use --multihost"
    )
  return client


def _answer(key: str, process: int, what: str, seconds: float) -> str:
  try:
    return _client().blocking_key_value_get(f"{key}/{process}", int(1000 * seconds))
  except jax.errors.JaxRuntimeError:
    raise UserError(
      f"process {process} did not reach {what} within {seconds:.0f} s of process {jax.process_index()}: it has "
      "stopped, or runs another command or config; see its output"
    ) from None


def check_same(what: str, value: object) -> None:
  """Checks that all processes have the same value: rows of tokens, a config, a model's files.

  Args:
    what: its name in messages.
    value: an array, bytes, or anything whose `repr` is complete.

  Raises:
    UserError: on every process, with each one's checksum.
  """
  if jax.process_count() == 1:
    return
  _raise_unless_equal(what, exchange(what, f"{checksum(value)} on {socket.gethostname()}"))


def check_given(call: str, given: Mapping[str, object]) -> None:
  """Checks that all processes pass a call the same arguments; functions, such as progress callbacks, may differ.

  Args:
    call: its name in messages.
    given: its arguments by name.

  Raises:
    UserError: on every process, with each one's value or its checksum.
  """
  if jax.process_count() == 1:
    return
  host = socket.gethostname()
  mine = {name: f"{_brief(value)} on {host}" for name, value in given.items()}
  answers = [json.loads(answer) for answer in exchange(call, json.dumps(mine))]
  for name in given:
    _raise_unless_equal(f"{name} for {call}", [answer[name] for answer in answers])


def is_multiprocess(params: Params) -> bool:
  """Whether parameters are sharded over several processes, which then compute together."""
  mesh = mesh_of(params)
  return mesh is not None and mesh.is_multi_process


def check_call(params: Params, function: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
  """`check_given` for all arguments except ``self`` and ``params``, if ``params`` are spread; errors as there."""
  if is_multiprocess(params):
    call = inspect.signature(function).bind(*arguments, **named)
    call.apply_defaults()
    given = {name: value for name, value in call.arguments.items() if name not in ("self", "params")}
    check_given(function.__qualname__, given)


def same_call_on_all(function: Callable[Concatenate[M, Q, P], T]) -> Callable[Concatenate[M, Q, P], T]:
  """Decorates a function of a model and its parameters: if these are spread, all processes must call it alike."""

  @functools.wraps(function)
  def call(model: M, params: Q, *arguments: P.args, **named: P.kwargs) -> T:
    check_call(params, function, model, params, *arguments, **named)
    return function(model, params, *arguments, **named)

  return call


def _raise_unless_equal(what: str, answers: Sequence[str]) -> None:
  by_checksum: dict[str, list[str]] = {}
  for process, answer in enumerate(answers):
    found, _, host = answer.rpartition(" on ")
    by_checksum.setdefault(found, []).append(f"{process} ({host})")
  if len(by_checksum) > 1:
    said = "; ".join(f"{found} on process {', '.join(who)}" for found, who in by_checksum.items())
    raise UserError(f"processes have different {what}: {said}; give all of them the same")


def _brief(value: object) -> str:
  """A value for messages, or its checksum if long."""
  short = repr(value)
  return short if isinstance(value, int | float | str | None) and len(short) <= 16 else checksum(value)


def checksum(value: object) -> str:
  """An eight-digit checksum of a value, the same on every process."""
  return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()[:8]


def _plain(value: object) -> object:
  """A value's process-independent content: no addresses, no set order, no functions."""
  if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
    return value.shape, str(value.dtype)
  if isinstance(value, np.ndarray | jax.Array):
    array = np.asarray(value)
    return array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return type(value).__name__, _plain(fields)
  if isinstance(value, Mapping):
    return [(name, _plain(each)) for name, each in value.items()]
  if isinstance(value, tuple | list):
    return [_plain(each) for each in value]
  if isinstance(value, set | frozenset):
    return sorted(map(repr, value))
  if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType | functools.partial):
    return repr(None)  # as if there were none
  if type(value).__repr__ is object.__repr__:
    return repr(None) if callable(value) else type(value).__name__
  return repr(value)


def run_on_all(what: str, work: Callable[[], T], value_of: Callable[[T], object], seconds: float = _PATIENCE) -> T:
  """Work that every process does itself, such as reading files: a failure on one fails all.

  Args:
    what: its result's name in messages.
    work: the work.
    value_of: the part of the result that must be the same everywhere; see `check_same`.
    seconds: how long processes wait for each other; see `exchange`.

  Raises:
    UserError: if the work raises one on any process (which is named), or the results differ.
  """
  if jax.process_count() == 1:
    return work()
  fault, result = None, None
  try:
    result = work()
    mine = {"checksum": f"{checksum(value_of(result))} on {socket.gethostname()}"}
  except UserError as error:
    fault, mine = error, {"fault": str(error)}
  answers = [json.loads(answer) for answer in exchange(what, json.dumps(mine), seconds)]
  if fault is not None:
    raise fault
  if faults := [f"process {process}: {each['fault']}" for process, each in enumerate(answers) if "fault" in each]:
    raise UserError(f"{what} cannot be read on every process: " + "; ".join(faults))
  _raise_unless_equal(what, [each["checksum"] for each in answers])
  return cast(T, result)


def run_on_first(what: str, work: Callable[[], None]) -> None:
  """Work that the first process does for all, such as writing files; the others wait for it to finish.

  Raises:
    UserError: on every process, if the work raises one.
  """

  def done() -> str:
    work()
    return ""

  broadcast_text(what, done, FOREVER)


def runs_on_first(what: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
  """Decorates a function of files that the first process runs for all; see `run_on_first`."""

  def decorate(function: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> None:
      run_on_first(what, lambda: function(*arguments, **named))

    return call

  return decorate


def broadcast_text(what: str, work: Callable[[], str], seconds: float = _PATIENCE) -> str:
  """Broadcasts a text from the first process, for values that must come from one place.

  Raises:
    UserError: on every process, if the work raises one; if it takes longer.
  """
  if jax.process_count() == 1:
    return work()
  key = _key(what)
  if jax.process_index() > 0:
    answer = json.loads(_answer(key, 0, what, seconds))
    if "fault" in answer:
      raise UserError(f"process 0: {answer['fault']}")
    return answer["found"]
  say = lambda **answer: _client().key_value_set(f"{key}/0", json.dumps(answer))
  try:
    found = work()
  except BaseException as error:
    say(fault=str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    raise
  say(found=found)
  return found


def rows_of_all(rows: np.ndarray) -> np.ndarray:
  """Concatenates each host's own rows ``[rows, T]`` in host order.

  Functions of this library expect the same rows on every process; this builds them from different ones. Hosts may have
  different numbers of rows, of the same length.
  """
  if jax.process_count() == 1:
    return rows
  from jax.experimental import multihost_utils

  counts = [int(count) for count in exchange("numbers of rows", str(len(rows)))]
  padded = np.pad(rows, ((0, max(counts) - len(rows)), (0, 0)))
  gathered = multihost_utils.process_allgather(padded)
  return np.concatenate([each[:count] for each, count in zip(gathered, counts, strict=True)])


def wait_for_all(what: str) -> None:
  """Waits until every process has reached this call."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def broadcast_number(number: int) -> int:
  """The first process's number, on every process."""
  if jax.process_count() == 1:
    return number
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def gathered(values: dict[str, object]) -> list[dict[str, object]]:
  """JSON values of every process, on every process."""
  if jax.process_count() == 1:
    return [values]
  from jax.experimental import multihost_utils

  mine = np.frombuffer(json.dumps(values).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(mine.size))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: mine.size] = mine
  texts = multihost_utils.process_allgather(padded)
  return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]
