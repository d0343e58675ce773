"""Checkpoints: round trips over devices, faults, what is kept, stopping."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.train.checkpoint import Checkpoints, alone, stopping

EXTRA = {"config": {"rate": 1e-4, "parts": ["a", None]}, "position": 12, "seconds": 0.1}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    optimizer: Any
    key: jax.Array


def make(devices: int, value: float = 0.0, width: int = 1024) -> State:
    """A sharded state whose numbers come from `value`."""
    mesh = meshes.make(devices=jax.devices()[:devices])
    rows = meshes.sharding(mesh, (8, width), ("embed", None))
    with jax.set_mesh(mesh):
        w = jax.device_put(np.arange(8 * width, dtype=np.float32).reshape(8, width) + value, rows)
        params = {"block": {"kernel": w, "bias": jnp.full(3, value, jnp.bfloat16)}, "empty": {}}
        optimizer = jax.jit(optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init)(params)
        step = jnp.int32(value)
    return State(step, params, optimizer, jax.random.key(int(value)))


def shape_of(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def same(a, b):
    def equal(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(equal, a, b)


def opened(folder: Path, keep: int = 2, keep_every: int = 0) -> Checkpoints:
    return Checkpoints(folder, every=10, keep=keep, keep_every=keep_every)


@pytest.fixture
def saved(tmp_path) -> Path:
    """Steps 10 and 20, of value 10 and 20."""
    with opened(tmp_path / "run") as checkpoints:
        for step in (10, 20):
            assert checkpoints.save(step, make(8, step), EXTRA | {"position": step})
    return tmp_path / "run"


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_round_trip_onto_devices(saved, devices):
    with opened(saved) as checkpoints:
        step, state, extra = checkpoints.restore(shape_of(make(devices)))
    assert (step, extra) == (20, EXTRA | {"position": 20})
    want = make(devices, 20)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    same(state, want)
    assert state.params["block"]["kernel"].sharding == want.params["block"]["kernel"].sharding


def test_nothing_there(tmp_path):
    with opened(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(shape_of(make(1))) is None


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    overwrite = jax.jit(lambda a: a * 0 - 1, donate_argnums=0)
    state = {"w": jnp.arange(1e6), "count": 3}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, EXTRA, force=True)
        overwrite(state["w"]).block_until_ready()
    with opened(tmp_path) as checkpoints:
        _, state, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((10**6,), jnp.float32),
                                           "count": 0})
    np.testing.assert_array_equal(state["w"], np.arange(1e6, dtype=np.float32))
    assert state["count"] == 3


def test_some_leaves_are_enough(saved):
    wanted = jax.tree.map(lambda _: ocp.PLACEHOLDER, make(8)).replace(
        params=shape_of(make(8).params))
    with opened(saved) as checkpoints:
        _, state, _ = checkpoints.restore(wanted)
    same(state.params, make(8, 20).params)
    assert state.key is ocp.PLACEHOLDER


def test_when_it_saves_and_what_it_keeps(tmp_path):
    with opened(tmp_path, keep=2, keep_every=30) as checkpoints:
        done = [s for s in range(1, 81) if checkpoints.save(s, {"a": jnp.ones(2)}, {})]
        assert done == list(range(10, 81, 10))
        assert checkpoints.save(81, {"a": jnp.ones(2)}, {}, force=True)
        assert not checkpoints.save(81, {"a": jnp.ones(2)}, {}, force=True)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [30, 60, 80, 81]


FAULTS = ["state/_METADATA", "_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/d/*",
          "state/ocdbt.process_0/d/*"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["truncated", "missing"])
@pytest.mark.parametrize("name", FAULTS)
def test_falls_back_to_the_step_before(saved, name, how, caplog):
    broken, = (saved / "20").glob(name)
    whole = broken.read_bytes()
    broken.unlink()
    if how == "truncated":
        broken.write_bytes(whole[:len(whole) // 2])
    with opened(saved) as checkpoints:
        step, state, extra = checkpoints.restore(shape_of(make(8)))
        assert (step, extra["position"]) == (10, 10)
        same(state, make(8, 10))
        assert "step 20 in" in caplog.text
        assert "going on from step 10" in caplog.text
        assert "Traceback" not in caplog.text
        checkpoints.save(20, make(8, 21), EXTRA)
        checkpoints.close()
        assert sorted(p.name for p in saved.iterdir()) == ["10", "20"]
    with opened(saved) as checkpoints:
        same(checkpoints.restore(shape_of(make(8)))[1], make(8, 21))


def test_half_written_last_step(saved, caplog):
    half = saved / "30.orbax-checkpoint-tmp"
    shutil.copytree(saved / "20", half)
    shutil.rmtree(half / "state/d")
    with opened(saved) as checkpoints:
        assert checkpoints.restore(shape_of(make(8)))[0] == 20
        assert "step 30 in" in caplog.text
        assert "only half written" in caplog.text
        assert half.exists()
        checkpoints.save(30, make(8, 30), EXTRA)
    assert sorted(p.name for p in saved.iterdir()) == ["20", "30"]


@pytest.fixture
def full_disk():
    """A context in which no file of this process can grow beyond 100 kB."""
    @contextlib.contextmanager
    def full():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return full


def test_full_disk(saved, full_disk):
    checkpoints = opened(saved)
    checkpoints.restore(shape_of(make(8)))
    with full_disk():
        assert checkpoints.save(30, make(8, 30, width=2**15), EXTRA)
        with pytest.raises(InputError, match=r"step 30 could not be saved .*the disk is full; make "
                                             r"room and start again: the run goes on from step 20"):
            checkpoints.save(40, make(8, 40), EXTRA)
    checkpoints.close()
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20"]
    with opened(saved) as checkpoints:
        same(checkpoints.restore(shape_of(make(8)))[1], make(8, 20))


def test_unreadable_steps_stay_until_a_newer_one_is_whole(saved, full_disk):
    (saved / "20/state/_METADATA").unlink()
    before = [p.read_bytes() for p in sorted((saved / "20").rglob("*")) if p.is_file()]
    checkpoints = opened(saved)
    checkpoints.restore(shape_of(make(8)))
    with full_disk():
        checkpoints.save(20, make(8, 20, width=2**15), EXTRA)
        with pytest.raises(InputError, match="goes on from step 10"):
            checkpoints.close()
    aside, = saved.glob("unreadable-20-*")
    assert before == [p.read_bytes() for p in sorted(aside.rglob("*")) if p.is_file()]
    with opened(saved) as checkpoints:
        assert checkpoints.restore(shape_of(make(8)))[0] == 10


def test_none_can_be_read(saved):
    for step in (10, 20):
        (saved / f"{step}/state/_METADATA").unlink()
    with opened(saved) as checkpoints, pytest.raises(InputError, match=r"none of .*\[10, 20\]"):
        checkpoints.restore(shape_of(make(8)))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        opened(tmp_path / "file" / "run")


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.replace(params=s.params | {"new": s.step}), "params/new is not stored there"),
    (lambda s: s.replace(params={"empty": {}}), "params/block/bias is stored there, and not"),
    (lambda s: s.replace(key=s.step), r"key is int32\[\], and uint32\[2\] there"),
    (lambda _: shape_of(make(8, width=32)),
     r"params/block/kernel is float32\[8, 32\], and float32\[8, 1024\] there"),
])
def test_another_state(saved, change, message):
    with opened(saved) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(change(shape_of(make(8))))


HOLD = """
import sys
from pathlib import Path
from unipic_jax.train.checkpoint import alone
with alone(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(InputError, match="another run is in"), alone(tmp_path):
            pass
        other.kill()
    with alone(tmp_path):
        pass


def test_sigterm_asks_for_a_stop():
    before = signal.getsignal(signal.SIGTERM)
    with stopping() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
        assert stop(3)
    assert signal.getsignal(signal.SIGTERM) is before


PROCESS = """
import os, signal, sys, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np, logging
jax.config.update("jax_platforms", "cpu")
logging.basicConfig()
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from unipic_jax.core import mesh as meshes
from unipic_jax.train.checkpoint import Checkpoints, stopping

mesh = meshes.make()
rows = meshes.sharding(mesh, (8, 4096), ("embed", None))
def make(value):
    return {"w": jax.make_array_from_callback(
        (8, 4096), rows, lambda i: np.full((8, 4096), value, np.float32)[i]),
        "key": jax.jit(jax.random.key, out_shardings=meshes.sharding(mesh, (), ()))(value)}

wanted = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), make(0))
with Checkpoints(folder, every=10, keep=3, keep_every=0) as checkpoints, stopping() as stop:
    found = checkpoints.restore(wanted)
    start = found[0] if found else 0
    if found:
        assert all((s.data == start).all() for s in found[1]["w"].addressable_shards)
    for step in range(start + 1, start + 2000):
        ends = stop(step)
        checkpoints.save(step, make(step), {"at": step}, force=ends)
        if ends or step == 20:
            break
        if step == 25 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)
print("from", start, "to", step, flush=True)
"""


def test_two_processes(tmp_path):
    def run():
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        both = [subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(port), str(tmp_path / "run")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in (0, 1)]
        outputs = [p.communicate(timeout=300)[0] for p in both]
        assert [p.returncode for p in both] == [0, 0], outputs
        return outputs

    for output in run():
        assert "from 0 to 20" in output
    # A file that only the second process reads: it cannot, so both take the step before.
    second, = (tmp_path / "run/20/state/ocdbt.process_1/d").iterdir()
    second.write_bytes(b"")
    for output in run():
        assert "going on from step 10" in output
        assert "from 10 to 20" in output
    outputs = run()
    last = {o.split("to ")[-1].strip() for o in outputs}
    assert len(last) == 1, outputs
    assert 25 < int(last.pop()) < 2019
