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
    side, nft = recipe.picture_side(config), isinstance(how.objective, Nft)
    target = {"target": jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)}
    guided = 1 + (drawing.guidance_scale > 1)

    def parts(prompts):
        """Of a sample's forward and backward, and of what is encoded once a prompt."""
        forward = cost.forward(config.objective, stage.parts, prompts | target)
        each = guided * forward.pop("transformer")
        encode = forward.pop("vae")  # of target and source, where only an edit's source is needed
        shared = ("source" in prompts) * encode / 2 + guided * sum(forward.values())
        return each, flops.training(0, each) if config.lora.rank else flops.training(each), shared

    each, learned, shared = parts(prompts)
    learned += each * (bool(how.objective.kl) + nft)  # DiffusionNFT's old policy at every step
    total = drawing.steps * each + drawing.size * how.passes * learned
    if how.rounds > 1 and not nft:
        total += drawing.size * each  # the old policy, once for all updates
    total += flops.decode(stage.parts["vae"].config, side, side)
    if judge:
        total += sum(cost.forward("judgement", judge, prompts | target).values())
    if "kept" in prompts:
        once, trained, encoded = parts(prompts["kept"])
        total += (how.rounds * (trained + once) + encoded) * config.rl.kept.batch / config.batch
    return total + shared / config.rl.group
