"""What a compiled program moves between devices and to and from their memory, read from the text
of its HLO.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
         "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9a-z]+)?)\[([0-9,]*)\]")
_PLACED = re.compile(r"\b[a-z]+[0-9]*(?:e[0-9a-z]+)?\[[0-9,]*\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|"
                     r"called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_GROUPS = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NETWORK = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([0-9,]*)\}')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


class Instruction(NamedTuple):
    where: str  # the computation it is of
    name: str
    opcode: str
    result: str  # its type, as text
    rest: str  # operands and attributes, as text


class Moved(NamedTuple):
    """One kind of collective over groups of one size."""

    kind: str
    group: int  # devices that take part
    count: float  # times that it runs, in one run of the program
    size: float  # bytes of all its results, one device's
    network: bool = False  # whether it crosses slices


def collectives(text: str) -> list[Moved]:
    """What one run of the program moves, by kind and group, the most bytes first.

    Asynchronous collectives count once, where they start, those too that XLA divides among
    fusions. The size is that of what a device holds after: of an all-gather the whole, of a
    reduce-scatter a part. Those between slices go by way of the hosts, and their groups are of
    slices.
    """
    module, entry = parse(text)
    counts, sizes, later = collections.Counter(), collections.Counter(), _later(module)
    for op, times in _run(module, entry, 1, inside=True):
        kind, across = op.opcode.removesuffix("-start"), _NETWORK.search(op.rest)
        if kind in COLLECTIVES:
            if op in later:
                continue
            key = kind, group_size(op.rest), False
            size = _result_bytes(op, kind)
        elif op.opcode == "recv" and across:
            slices = _SLICES.search(op.rest)
            key = (across[1].lower().replace("_", "-"), slices[1].count(",") + 1 if slices else 2,
                   True)
            size = array_bytes(op.result) - BYTES["u32"]  # with a number for the hosts
        else:
            continue
        counts[key] += times
        sizes[key] += times * size
    return sorted((Moved(*key[:2], counts[key], size, key[2]) for key, size in sizes.items()),
                  key=lambda m: -m.size)


def _later(module):
    """The collectives in fusions that go on with, or end, one that another fusion has begun: those
    of its channel that start nothing."""
    begin = {where for where, body in module.items()
             if any('"AsyncCollectiveStart"' in op.rest for op in body)}
    fused = {dict(_attributes(op.rest)).get("calls") for body in module.values() for op in body
             if op.opcode == "fusion"}
    channels = {where: {op: _CHANNEL.search(op.rest) for op in module.get(where, ())}
                for where in fused}
    begun = {found[1] for where in begin & fused for found in channels[where].values() if found}
    return {op for where in fused - begin for op, found in channels[where].items()
            if found and found[1] in begun}


def traffic(text: str) -> float:
    """Bytes that one device reads from its memory and writes to it, in one run.

    Each operation reads its operands and writes its results, fused ones together; of what it only
    takes a slice of, or writes a slice into, that slice counts. What XLA keeps in a faster memory
    counts as nothing.
    """
    module, entry = parse(text)
    types = {name: {i.name: i.result for i in body} for name, body in module.items()}
    return sum(times * _touched(module, types, op)
               for op, times in _run(module, entry, 1, inside=False)
               if op.opcode not in FREE and not op.opcode.endswith("-done"))


FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
        "call", "partition-id", "replica-id", "after-all", "iota")
SLICES = ("dynamic-slice", "slice", "gather")


def _run(module, name, times, *, inside):
    """The instructions of a computation and of those it calls, with how often they run; those
    `inside` of fusions too, or not."""
    for op in module.get(name, ()):
        yield op, times
        if op.opcode == "while":
            called = dict(_attributes(op.rest))
            yield from _run(module, called["body"], times * _trips(module, op, called),
                            inside=inside)
        elif op.opcode in ("call", "conditional") or (inside and not op.opcode.endswith("-done")):
            for attribute, other in _attributes(op.rest):
                if attribute != "to_apply" or op.opcode == "call":
                    yield from _run(module, other, times, inside=inside)


def _touched(module, types, op):
    """Bytes of one instruction."""
    operands = [types[op.where].get(name, "") for name in _operands(op)]
    if op.opcode == "dynamic-slice":
        return 2 * _slow_bytes(op.result)
    if op.opcode == "dynamic-update-slice":
        return 2 * _slow_bytes(operands[1])
    if op.opcode in ("slice-start", "dynamic-slice-start"):  # ((operands), slice, ...)
        part = _PLACED.search(op.result.partition("), ")[2])[0]
        return _slow_bytes(part) + bool(_slow_bytes(operands[0])) * array_bytes(part)
    if op.opcode.endswith("-start") and not op.opcode.startswith("all-reduce"):
        return _slow_bytes(op.result)  # has the operands beside what is made
    called = dict(_attributes(op.rest)).get("calls", "")
    if op.opcode != "fusion" or not module.get(called):
        return sum(map(_slow_bytes, [op.result, *operands]))
    total, updated = 0.0, 0.0
    for number, outer in enumerate(operands):
        if not _slow_bytes(outer):
            continue
        using, part = _use(module, types, called, number)
        total += min(_slow_bytes(outer), part)
        if using == "update":
            updated += _slow_bytes(outer) - part
    return total + max(_slow_bytes(op.result) - updated, 0.0)


def _use(module, types, computation, number):
    """What a computation does with a parameter, "read" or "update", and the bytes of that: of all
    of it, or where it only takes slices or writes one into it, in computations it calls too, of
    these."""
    body = module[computation]
    name = next((i.name for i in body if i.opcode == "parameter"
                 and i.rest.startswith(f"parameter({number})")), None)
    whole = array_bytes(types[computation].get(name, ""))
    total, kinds, names = 0.0, set(), [name]
    for name in names:
        for user in body:
            given = _operands(user)
            if name not in given:
                continue
            called = dict(_attributes(user.rest)).get("calls", "")
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in SLICES:
                total += array_bytes(user.result)
                kinds.add("read")
            elif user.opcode == "dynamic-update-slice" and given[0] == name:
                total += array_bytes(types[computation].get(given[1], ""))
                kinds.add("update")
            elif user.opcode == "fusion" and module.get(called):
                for place in (i for i, n in enumerate(given) if n == name):
                    kind, part = _use(module, types, called, place)
                    total += part
                    kinds.add(kind)
            else:
                return "read", whole
    if body[-1].name in names:  # handed on as it is
        return "read", whole
    return ("update" if kinds == {"update"} else "read"), min(total, whole)


def _slow_bytes(text):
    """Of the arrays in a type that lie in the main memory, which has no number."""
    return sum(array_bytes(found[0]) for found in _PLACED.finditer(text)
               if not found[1] or "S(" not in found[1])


def _operands(op):
    """The names of what an instruction is given."""
    depth, inside = 0, op.rest.partition("(")[2]
    for at, letter in enumerate(inside):
        depth += (letter in "({") - (letter in ")}")
        if depth < 0:
            inside = inside[:at]
            break
    return re.findall(r"%([\w.\-]+)", inside)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation by name, and the name of the one that is run."""
    module, entry, where, current = {}, "", "", None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                where, current = head[1], module.setdefault(head[1], [])
                if line.startswith("ENTRY"):
                    entry = head[1]
        elif line.rstrip() == "}":  # kernels have lines that begin with more than one
            current = None
        elif found := _INSTRUCTION.match(line):
            name, right = found.groups()
            opcode = _OPCODE.search(right)
            if opcode:
                at = opcode.start(1)
                current.append(Instruction(where, name, opcode[1], right[:at], right[at:]))
    return module, entry


def array_bytes(text: str) -> float:
    """Of all arrays in a type."""
    return sum(math.prod(map(int, filter(None, shape.split(",")))) * BYTES[kind]
               for kind, shape in _ARRAY.findall(text) if kind in BYTES)


def group_size(attributes: str) -> int:
    """How many devices a collective's groups have; 1 where that is not said."""
    if found := _GROUPS.search(attributes):
        return found[1].count(",") + 1
    if found := _IOTA.search(attributes):
        return int(found[2])
    if found := _MESH.search(attributes):
        sizes = dict(pair.strip().split("=") for pair in found[1].split(","))
        names = [name.strip().strip("'") for name in found[2].split(",")]
        return math.prod(int(size) for name, size in sizes.items() if name.strip("'") in names)
    return 1


def _result_bytes(op, kind):
    if not op.opcode.endswith("-start"):
        return array_bytes(op.result)
    # The result of a start has its operands first, or alone (all-reduce).
    arrays = [array_bytes(f"{k}[{s}]") for k, s in _ARRAY.findall(op.result) if k in BYTES]
    if kind == "all-reduce":
        return sum(arrays)
    wanted = arrays[len(arrays) // 2:] if len(arrays) % 2 == 0 else arrays[1:2]
    return sum(wanted)


def _attributes(rest):
    for found in _CALLED.finditer(rest):
        attribute = found[0].split("=")[0]
        for name in (found[1] or found[2]).split(","):
            yield attribute, name.strip().lstrip("%")


def _trips(module, op, called):
    """How often a loop runs: as XLA notes it, or the bound of a counter that goes up by one."""
    if known := _TRIPS.search(op.rest):
        return int(known[1])
    values = {i.name: i for i in module[called["condition"]]}
    for i in values.values():
        if i.opcode == "compare" and "direction=LT" in i.rest:
            for name in re.findall(r"%([\w.\-]+)", i.rest.split(")")[0]):
                if name in values and values[name].opcode == "constant":
                    return int(values[name].rest.split("(")[1].split(")")[0])
    return 1
