"""Programs timed turn by turn, each in a process of its own that waits while the other works."""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import Any

WARM = 2  # calls before those that count


def alternate(
    sides: Mapping[str, Callable[..., Callable[[], Any]]], args: tuple, turns: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What each side gives the last time before it is timed, and its seconds at each turn.

    A side is a module's function of `args` that returns the function to time.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes, results = {}, [], {}
    for name, prepare in sides.items():
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=_serve, args=(prepare, args, other), daemon=True))
        processes[-1].start()
        other.close()  # so that a process that fails is the end, not a wait
        results[name] = pipes[name].recv()
    seconds = {name: [] for name in pipes}
    for _ in range(turns):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(False)
        process.join()  # its memory goes with it
    return results, seconds


def _serve(prepare, args, pipe):
    work = prepare(*args)
    for _ in range(WARM):
        result = work()
    pipe.send(result)
    while pipe.recv():
        start = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - start)
