"""The command of `unipic` that offers rewards to others."""

import argparse

from unipic_jax.core.errors import InputError


def add(command) -> None:
    """Declare the command by `command(name, run, text)`, which gives a parser."""
    sub = command("reward-server", _serve, "Offer a reward to trainers over HTTP.")
    sub.add_argument("--reward", required=True,
                     choices=("blocks-generate", "blocks-edit", "geneval"))
    sub.add_argument("--detector", metavar="URL", default=argparse.SUPPRESS,
                     help="geneval: the server that finds objects (`rl.rewards.geneval`)")
    sub.add_argument("--port", type=int, required=True, help="0 takes a free one")
    sub.add_argument("--host", default="127.0.0.1",
                     help="the address to listen on; 0.0.0.0 for other machines to reach it")


def _serve(args):
    from unipic_jax.cli import keep_programs
    from unipic_jax.rl.rewards import builtin, geneval, server
    from unipic_jax.rl.rewards.http_client import Connection, Remote

    if not 0 <= args.port < 2**16:
        raise InputError("--port must lie between 0 and 65535")
    keep_programs()
    detector = getattr(args, "detector", None)
    if (args.reward == "geneval") != (detector is not None):
        raise InputError("--detector goes with --reward geneval, and that with --detector")
    if detector:
        scorer = geneval.GenEvalScorer(Remote(Connection(detector)))
    else:
        scorer = builtin.BlocksScorer(args.reward.removeprefix("blocks-"))
    with server.Server(scorer, args.host, args.port) as serving:
        name, version, _ = serving.health
        print(f"{serving.url}: {name} {version}", flush=True)
        serving.serve_forever()
