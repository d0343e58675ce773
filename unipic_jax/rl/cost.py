"""The floating-point operations of a sample of reinforcement, from a stage's config."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from unipic_jax.model import Part
from unipic_jax.rl import recipe
from unipic_jax.rl.objective import Nft
from unipic_jax.train import cost, flops
from unipic_jax.train.stage import Stage


def per_sample(
    config, stage: Stage, prompts: dict, judge: Mapping[str, Part] | None = None
) -> float:
    """Operations a sample of a rollout, its reward and its updates; see `flops.training`.

    Each step samples with as many forwards as guidance needs, each trained step learns with as
    many, and the reference takes part where a divergence is weighed. A prompt is encoded once a
    group. Rewards of blocks count as nothing.
    """
    how, drawing = recipe.learning(config), recipe.sampling(config)
    side = recipe.picture_side(config)
    batch = prompts | {"target": jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)}
    forward = cost.forward(config.objective, stage.parts, batch)
    edit, guided = "source" in prompts, 1 + (drawing.guidance_scale > 1)
    each = guided * forward.pop("transformer")
    learned = flops.training(0, each) if config.lora.rank else flops.training(each)
    learned += each * bool(how.objective.kl)
    rolled = drawing.steps * each + drawing.size * how.passes * learned
    if how.rounds > 1 and not isinstance(how.objective, Nft):
        rolled += drawing.size * each  # the old policy, once for all updates
    encode = forward.pop("vae")  # of target and source, where only the source of an edit is needed
    shared = edit * encode / 2 + guided * sum(forward.values())
    total = rolled + flops.decode(stage.parts["vae"].config, side, side)
    if judge:
        total += sum(cost.forward("judgement", judge, batch).values())
    return total + shared / config.rl.group
