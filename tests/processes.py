"""Runs of several processes that find each other on this machine."""

import socket
import time

import micro

# No kept programs, which one process would find and the other not, and then wait for it too long.
FRESH = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def start(count, workdir, *arguments, devices=8, command="train"):
    """The processes of a run, the first one first, with so many devices in all."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    return [micro.start(workdir, "--distributed", *arguments, devices=devices // count,
                        command=command, JAX_COORDINATOR_ADDRESS=address,
                        JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(i), **FRESH)
            for i in range(count)]


def finish(processes):
    """What processes that all end well have said."""
    try:
        return [micro.finish(p) for p in processes]
    finally:
        for p in processes:
            p.kill()


def kill_one(workdir, *arguments, when, **more):
    """Start two processes, kill the second once `when()` holds, and wait for the first, which has
    to stop when it misses a heartbeat."""
    first, second = start(2, workdir, *arguments, **more)
    while not when():
        assert first.poll() is second.poll() is None
        time.sleep(0.01)
    second.kill()
    said, _ = first.communicate(timeout=200)
    assert first.returncode not in (0, None)
    assert "another task died" in said
    assert not (workdir / "model").exists()
