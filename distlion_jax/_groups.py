# SPDX-License-Identifier: Apache-2.0
"""Which devices take part in a collective together, in all the spellings of HLO.

In:  the attributes of an instruction. Out: groups of devices, as places in a mesh.
"""

import math
import re

import numpy as np
from jax.sharding import Mesh

_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")  # {{0,1},{2,3}}
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\S+)")  # [groups,size]<=[2,4]T(1,0)
# mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y':(1)2}: axes of XLA's own, or parts of them.
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_AXIS = re.compile(r"('[^']*')(?::\((\d+)\)(\d+))?")  # a part: behind so many, of so many
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_TARGET = re.compile(r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})')  # between slices
_SLICE = 100_000  # device 3 of the first slice is 100003


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _lists(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]


def _replica_groups(attributes: str) -> list[list[int]]:
    """Devices that take part together, as places in the program's list of them; [] if not said."""
    if match := _LISTED.search(attributes):
        return _lists(match[1])
    if match := _IOTA.search(attributes):
        return _devices(match[2]).reshape(_ints(match[1])).tolist()
    if match := _MESH.search(attributes):
        return _mesh_groups(*match.groups())
    return []


def _devices(text: str) -> np.ndarray:
    """Devices in the order that ``[2,4]T(1,0)`` says, or that is listed."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return np.array(_ints(text))
    sizes = _ints(match[1])
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_ints(match[2])) if match[2] else ids).reshape(-1)


def _mesh_groups(axes: str, devices: str | None, together: str) -> list[list[int]]:
    """Groups along axes of a mesh: devices whose places are equal but for these axes."""
    sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", axes)}
    count = math.prod(sizes.values())
    places = np.stack(np.unravel_index(np.arange(count), list(sizes.values())), axis=1)
    for name, before, size in _AXIS.findall(together):
        k, whole = list(sizes).index(name), sizes[name]
        behind = whole // (int(before or 1) * int(size or whole))
        places[:, k] -= places[:, k] // behind % int(size or whole) * behind
    groups: dict[tuple[int, ...], list[int]] = {}
    ids = _devices(devices) if devices else np.arange(count)
    for place, device in zip(map(tuple, places.tolist()), ids.tolist(), strict=True):
        groups.setdefault(place, []).append(device)
    return list(groups.values())


def _between_slices(target: str) -> list[list[int]]:
    """Devices of several slices of TPUs that take part together, numbered as in the target."""
    slices, product, chips = target.strip('"').partition("x")
    if not product:  # {{100000,200000}}, or {{100000->200000}}
        return _lists(target.replace("->", ","))
    ends = _ints(chips.strip("{}").replace(":", ","))  # {1,2}x{0:3}: four groups of two
    return [[n * _SLICE + k for n in _lists(slices)[0]] for k in range(ends[0], ends[-1] + 1)]


def numbers_of_devices(mesh: Mesh) -> tuple[list[dict[int, int]], dict[int, int]]:
    """Places in the mesh by the numbers that a program gives them: in each slice, between slices.

    A slice of TPUs counts its own, in the order of the mesh; between slices they go by their ids.
    """
    slices: dict[int, list[int]] = {}
    for place, device in enumerate(mesh.devices.flat):
        slice_index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(slice_index, []).append(place)
    between: dict[int, int] = {}
    for slice_index, places in slices.items():
        by_id = sorted(places, key=lambda place: mesh.devices.flat[place].id)
        between |= {(slice_index + 1) * _SLICE + k: place for k, place in enumerate(by_id)}
    return [dict(enumerate(places)) for places in slices.values()], between


def groups_of(
    attributes: str, inside: list[dict[int, int]], between: dict[int, int]
) -> list[list[int]]:
    """Devices that take part together, as places in the mesh; all of it where that is not said."""
    if target := _TARGET.search(attributes):
        groups, known = _between_slices(target[1]), [between]
    else:
        pairs = _PAIRS.search(attributes)
        groups, known = _replica_groups(attributes) or _lists(pairs[1] if pairs else ""), inside
    everyone = [list(between.values())]
    try:
        return [[at[x] for x in group] for at in known for group in groups if group] or everyone
    except KeyError:  # numbers that are not of this mesh
        return everyone


def group_size(attributes: str, fallback: int) -> int:
    """How many take part together."""
    if groups := _replica_groups(attributes):
        return len(groups[0])
    target = _TARGET.search(attributes)
    together = _lists(target[1]) if target else []
    return len(together[0]) if together else fallback
