"""Device meshes, and the notation of their sizes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sa_jax.errors import UserError, shown
from sa_jax.fields import Count, check_fields

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")
_AXES = ("slice", *MESH_AXES)
_AUTO = "auto"
_SHOWN = ("data", "fsdp", "tensor")  # always shown in messages, even if of size 1


@dataclasses.dataclass(frozen=True)
class MeshSizes:
  """Sizes of the mesh axes, written ``data=2,fsdp=4`` or ``auto``. See `make_mesh` for what each axis splits.

  Attributes:
    data: as in `make_mesh`; None for all devices that the other axes leave.
    fsdp: as in `make_mesh`.
    expert: as in `make_mesh`.
    tensor: as in `make_mesh`.
    sequence: as in `make_mesh`.
    slice: as in `make_mesh`.

  Raises:
    UserError: if a size is below 1.
  """

  data: Count | None = None
  fsdp: Count = 1
  tensor: Count = 1
  sequence: Count = 1
  slice: Count = 1
  expert: Count = 1

  def __post_init__(self) -> None:
    check_fields(self, "mesh")

  @classmethod
  def parse(cls, text: str) -> MeshSizes:
    """Parses sizes such as ``data=2,fsdp=4``. Other axes have size 1, except that ``data`` takes the remaining devices.

    ``auto`` stands for no named axis.

    Raises:
      UserError: if the text has another form.
    """
    if text.strip() == _AUTO:
      return cls()
    sizes: dict[str, int] = {}
    for part in text.split(","):
      name, _, size = map(str.strip, part.partition("="))
      if name not in _AXES or name in sizes or not re.fullmatch("[0-9]{1,9}", size):
        axes = ", ".join(_AXES)
        raise UserError(
          f"invalid mesh {shown(text)}: give sizes of {axes}, each at most once, such as 'data=2,fsdp=4', or {_AUTO}"
        )
      sizes[name] = int(size)
    return cls(**sizes)

  def __str__(self) -> str:
    sizes = {name: size for name in _AXES if (size := getattr(self, name)) is not None}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if name == "data" or size > 1) or _AUTO

  def over(self, devices: int) -> MeshSizes:
    """The sizes for this many devices, with ``data`` filled in."""
    rest = self.slice * self.fsdp * self.expert * self.tensor * self.sequence
    return self if self.data is not None else dataclasses.replace(self, data=max(devices // rest, 1))

  def axes(self) -> dict[str, int]:
    """The size of each axis; an open ``data`` counts as 1."""
    return {name: getattr(self, name) or 1 for name in _AXES}

  @property
  def size(self) -> int:
    """The number of devices; an open ``data`` counts as 1."""
    return math.prod(self.axes().values())

  @property
  def ways(self) -> int:
    """The number of parts that rows are split into."""
    return self.slice * (self.data or 1) * self.fsdp * self.expert

  @property
  def ways_spelt(self) -> str:
    """`ways` as a product, for messages."""
    before, after = "slice × " if self.slice > 1 else "", " × expert" if self.expert > 1 else ""
    return f"{before}data × fsdp{after} = {self.ways}"

  def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over ``devices``, by default all. Raises as `make_mesh`."""
    devices = jax.devices() if devices is None else devices
    return make_mesh(**dataclasses.asdict(self.over(len(devices))), devices=devices)


def make_mesh(
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  sequence: int = 1,
  *,
  slice: int = 1,
  expert: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of devices with the axes that `sa_jax.sharding.DEFAULT_RULES` use.

  Args:
    data: size of the axis that splits rows (data parallelism).
    fsdp: size of the axis that splits rows and parameters (fully sharded data parallelism).
    tensor: size of the axis that splits heads, MLP and vocabulary (tensor parallelism).
    sequence: size of the axis that splits the tokens of a row. Attention uses an all-to-all between tokens and heads if
      the KV heads can be split over ``tensor * sequence`` devices; otherwise it gathers keys and values. Queries and
      keys are communicated once per group, values once per layer.
    slice: number of slices, connected by a data-centre network. Only rows are split over slices, so a train step
      communicates only gradients between them, once; all other axes stay within a slice. With one slice, the mesh does
      not have this axis.
    expert: size of the axis that splits rows and the experts of a mixture (`sa_jax.ops.Experts`). Tokens are gathered
      before the experts, and their outputs are reduce-scattered.
    devices: by default all devices.

  Raises:
    UserError: if the product of the sizes is not the number of devices, or the devices belong to another number of
      slices.
  """
  sizes = dict(zip(MESH_AXES, (data, fsdp, expert, tensor, sequence), strict=True))
  devices = jax.devices() if devices is None else devices
  _check_sizes(sizes, slice, devices)
  axis_types = (AxisType.Auto,) * len(sizes)
  if slice == 1:
    return Mesh(_arranged(tuple(sizes.values()), devices), MESH_AXES, axis_types=axis_types)
  return Mesh(
    _in_slices(tuple(sizes.values()), slice, devices), ("slice", *MESH_AXES), axis_types=(AxisType.Auto, *axis_types)
  )


def check_devices(params: object, mesh: Mesh) -> None:
  """Checks that all parameters are on the devices of a mesh, or uncommitted.

  Raises:
    UserError: if one is committed to other devices.
  """
  devices = set(mesh.devices.flat)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    bound = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed
    if bound and leaf.sharding.device_set != devices:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise UserError(
        f"{name} is on {len(leaf.sharding.device_set)} of the devices, others are on a mesh of {len(devices)}: move "
        "all with jax.device_put(params, sa_jax.sharding.param_shardings(model, mesh, layout=...))"
      )


def _check_sizes(sizes: Mapping[str, int], slices: int, devices: Sequence[jax.Device]) -> None:
  shown = {name: size for name, size in (("slice", slices), *sizes.items()) if name in _SHOWN or size != 1}
  product = slices * math.prod(sizes.values())
  if product != len(devices):
    spelt = " × ".join(f"{name} {size}" for name, size in shown.items())
    raise UserError(f"a mesh of {spelt} needs {product} devices; there are {len(devices)}")
  found = _slices(devices)
  if found != slices and (slices > 1 or devices[0].platform == "tpu") and found > 1:
    raise UserError(f"slice={slices}, but the devices belong to {found} slices; use slice={found}")


def _slices(devices: Sequence[jax.Device]) -> int:
  return len({getattr(device, "slice_index", 0) for device in devices})


def _in_slices(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices ``[slices, *shape]``. If devices do not report their slice, they are split into equal contiguous parts."""
  if _slices(devices) > 1:
    from jax.experimental import mesh_utils

    ones = (1,) * len(shape)
    return mesh_utils.create_hybrid_device_mesh((1, *shape), (slices, *ones), devices, allow_split_physical_axes=True)
  size = len(devices) // slices
  parts = [devices[start : start + size] for start in range(0, len(devices), size)]
  return np.stack([_arranged(shape, part) for part in parts])


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices of one slice, arranged by the topology of their network."""
  from jax.experimental import mesh_utils

  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
