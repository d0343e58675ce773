"""What a stage's real step costs on a machine that is not here: compiled ahead of time for it."""

import logging
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.plan import chips, count, hlo, programs

log = logging.getLogger(__name__)


def prepare(topology: str) -> None:
    """Set up JAX to compile for a topology; before it has looked for devices."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    platform, number = _platform(topology)
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", number)


def plan(config, topology: str, *, kind: str, task: str, slices: int = 1) -> dict[str, Any]:
    """The costs of one run of a program of a stage on a topology, as a report by name.

    `topology` is GENERATION:SHAPE for TPUs, such as v5p:4x4x4, `slices` of them; or cpu:N, for
    which JAX has to have N CPU devices; or gpu:N, for which nothing is compiled. What is not known
    is left out, and "left_out" says what and why. "effort" is that of JAX's config, from -1 to 1,
    at which it was compiled. Raises InputError for a topology that is not known, or a config that
    does not fit it.
    """
    platform, number = _platform(topology)
    chip = chips.find(topology) if platform == "tpu" else None
    mesh = _mesh(config, topology, platform, number, slices)
    devices = mesh.size
    total = devices // (chip.devices if chip else 1)
    program = programs.make(config, kind, task, mesh)
    report = {
        "topology": topology, "slices": slices, "chips": total, "mesh": dict(mesh.shape),
        "program": kind, "task": task, "batch": config.batch, "remat": config.remat,
        "parameters": program.parameters, "trained": program.trained,
        "flops_per_sample": program.flops, "effort": jax.config.jax_exec_time_optimization_effort}
    scope = jax.sharding.use_abstract_mesh if platform == "gpu" else jax.set_mesh
    with scope(mesh):
        traced = jax.jit(program.function, donate_argnums=program.donated).trace(
            *program.arguments)
        done = count.operations(traced.jaxpr, chip.width if chip else 1)
        report["recomputed"] = done.total / (program.flops * program.samples) - 1
        began = time.monotonic()
        lowered = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))
        report["lower_seconds"] = time.monotonic() - began
        if platform == "gpu":
            return report | {"left_out": "memory and collectives, which XLA tells where it "
                             "compiles for GPUs: on one of them"}
        log.info("compiling for %s; this takes minutes", topology)
        began = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return report | {"fits": False, "needed": str(e).splitlines()[0],
                             "suggestion": _suggestion(config, kind, mesh)} | _needed(str(e))
        report["compile_seconds"] = time.monotonic() - began
    return report | _measured(compiled, program, done, chip, total)


def _platform(topology):
    name, _, rest = topology.partition(":")
    if name in ("cpu", "gpu"):
        if not rest.isdecimal() or int(rest) < 1:
            raise InputError(f"topology {topology!r}: give {name}:N with the number of devices")
        return name, int(rest)
    return "tpu", 0


def _mesh(config, topology, platform, number, slices):
    if platform == "tpu":
        devices = _topology(topology, slices)
    elif platform == "cpu":
        devices = jax.devices("cpu")[:number]
        if len(devices) < number:
            raise InputError(f"topology {topology}: JAX has {len(devices)} CPU devices")
    else:
        devices = range(number)
    sizes = dict(config.mesh)
    try:
        if platform == "gpu":
            known = -sizes["data"] * sizes["fsdp"] * sizes["tensor"]
            shape = [number // known if s == -1 and known else s for s in sizes.values()]
            return jax.sharding.AbstractMesh(tuple(shape), meshes.AXES, (AxisType.Explicit,) * 3)
        return meshes.make(**sizes, devices=devices)
    except ValueError as e:
        raise InputError(str(e)) from None


def _topology(topology, slices):
    chips.find(topology)
    more = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if slices > 1:
        more["num_slices"] = slices
    try:
        return topologies.get_topology_desc(
            topology_name=topology, platform="tpu", **more).devices
    except (RuntimeError, ValueError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        if "libtpu" in str(e) or "plugin" in str(e):
            reason += "; pip install 'unipic_jax[tpu]' brings the TPU's compiler"
        raise InputError(f"topology {topology!r}: {reason}") from None


def _measured(compiled, program, done, chip, total):
    memory = compiled.memory_analysis()
    each = {"arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "output": memory.output_size_in_bytes - memory.alias_size_in_bytes}
    text = compiled.as_text()
    moved, traffic = hlo.collectives(text), hlo.traffic(text)
    # Less than all of these together: what is temporary takes the place of arguments that are
    # donated, where these are no longer needed.
    report = {"memory": each, "peak": memory.peak_memory_in_bytes + each["code"],
              "collectives": [m._asdict() for m in moved], "memory_traffic": traffic}
    if chip is None:
        return report | {"left_out": "times, for a CPU's peak is not known"}
    each_chip = chip.devices  # memory and traffic are a device's
    times = {
        "compute": done.padded / (total * chip.flops),
        "memory": each_chip * traffic / chip.bandwidth,
        "interconnect": each_chip * sum(
            _crossing(m) for m in moved if not m.network) / chip.interconnect,
        "network": each_chip * sum(
            _crossing(m) for m in moved if m.network) / chip.network}
    seconds = max(times.values())
    return report | {
        "fits": True, "capacity": chip.memory / chip.devices, "times": times,
        "bound": max(times, key=times.get), "seconds": seconds,
        "images_per_second_per_chip": program.samples / total / seconds,
        "mfu": program.flops * program.samples / (seconds * total * chip.flops)}


def _crossing(moved):
    """Bytes that a device gets from others, by the algorithms of rings."""
    n = moved.group
    share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}.get(moved.kind, (n - 1) / n)
    return moved.size * (1.0 if moved.kind == "collective-permute" else share)


def _suggestion(config, kind, mesh):
    rows = config.batch // (mesh.shape["data"] * mesh.shape["fsdp"])
    if kind == "sample":
        return f"a smaller batch: --batch {config.batch // 2}"
    if rows // config.micro_batches > 1:
        return ("the same batch in more parts: "
                f"--config.micro_batches={2 * config.micro_batches}")
    if config.remat != "full":
        return "less that is kept for the gradient: --config.remat=full"
    if mesh.shape["data"] > 1:
        return ("parameters over more devices: --config.mesh.data=1 --config.mesh.fsdp=-1")
    return "more chips"


def _needed(message):
    """What a program that does not fit would take, and what there is, as the compiler says it."""
    found = (re.search(r"Used ([\d.]+)G of ([\d.]+)G", message)
             or re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message))
    return {} if not found else {
        "peak": float(found[1]) * 2**30, "capacity": float(found[2]) * 2**30}
