"""A whole run of reinforcement learning: from a config and a folder to a model in it.

The folder holds what that of `train.loop` does, and a run goes on in the same way.
"""

import functools
import logging
from pathlib import Path

import jax
from ml_collections import ConfigDict

from unipic_jax.rl import learn, recipe
from unipic_jax.train import loop, optimizer, output, stage

log = logging.getLogger(__name__)


def reinforce(config: ConfigDict, workdir: Path, *, progress: bool = True) -> bool:
    """Run the stage to its end, or until SIGTERM; whether it came to the end.

    Raises InputError for a config that does not fit, weights that cannot be read, a full disk, or
    where too many steps in a row were not finite.
    """
    if (workdir / "model").exists():
        log.info("%s holds the model already", workdir)
        return True
    mesh = loop.open_mesh(config)
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        recipe.check(config, here)
        how = recipe.learning(config)
        trained, frozen = stage.parameters(config, here, mesh)
        frozen = recipe.frozen_reference(config, trained, frozen)
        total = config.steps * how.rounds
        timing = optimizer.Config(**config.optimizer)
        update = optimizer.make(timing, total)
        now = jax.jit(functools.partial(learn.new, how, optimizer=update))(trained)
        del trained
        advance = jax.jit(recipe.make_step(config, here, update, optimizer.schedule(timing, total)),
                          donate_argnums=0)
        prompts = recipe.Prompts(here, config.rl.task, config.batch // config.rl.group, mesh)
        data = loop.Data(config, here, frozen, mesh)
        end = loop.run(config, here, now, frozen, advance, prompts, data, workdir, mesh,
                       progress=progress)
        if end is not None:
            output.write(config, here, loop.weights(end), frozen, workdir / "model")
    return end is not None
