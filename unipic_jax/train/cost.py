"""The floating-point operations of a stage's step, from its config and the shapes of a batch."""

from collections.abc import Mapping

from unipic_jax.conditioning import kontext, qwen_chat, qwen_images
from unipic_jax.model import Part
from unipic_jax.models.qwen2_5_vl import vision
from unipic_jax.train import flops
from unipic_jax.train.stage import Stage


def per_sample(config, stage: Stage, batch: dict) -> float:
    """Operations a sample of a training step on such a batch; see `flops.training`.

    A part that the gradient passes through on its way to one that trains counts as passed: the
    transformer behind a conditioner or text encoders, the language model behind its queries.
    Adapters count as the weights they adapt being passed.
    """
    forwards = forward(config.objective, stage.parts, batch)
    trained = set() if config.lora.rank else set(stage.trained)
    passed = set(stage.trained) - trained
    if set(stage.trained) & {"conditioner", *kontext.LENGTHS}:
        passed |= {"transformer"} - trained
    if "conditioner" in stage.trained:
        passed |= {"mllm"} - trained

    def total(names):
        return sum(forwards[n] for n in names if n in forwards)

    return flops.training(total(trained), total(passed), total(forwards.keys() - trained - passed))


def forward(objective: str, parts: Mapping[str, Part], batch: dict) -> dict[str, float]:
    """Operations of each part's forward on one sample."""
    if objective == "answer":
        return {"mllm": _chat(parts["mllm"].config, batch["prompt"],
                              logits=batch["prompt"]["ids"].shape[1])}
    _, H, W, _ = batch["target"].shape
    if objective == "judgement":
        mllm, S = parts["mllm"], batch["judge"]["ids"].shape[1]
        images = qwen_chat.open_chat(mllm.folder).images
        h, w = (side // images.patch_size for side in qwen_images.smart_resize(images, H, W))
        windows = vision.count_windows(mllm.config.vision, [(1, h, w)] * 2)
        return {"mllm": flops.language(mllm.config, S) + flops.vision(mllm.config.vision, windows)}
    vae = parts["vae"].config
    encode = flops.encode(vae, H, W)
    if objective == "reconstruction":
        return {"vae": encode + flops.decode(vae, H, W)}
    cfg, prompt = parts["transformer"].config, batch["prompt"]
    T = H * W // (vae.factor * cfg.patch_size) ** 2
    edit = "source" in batch
    if "context" in prompt:  # cached
        S, counts = prompt["context"].shape[1], {}
    elif "conditioner" in parts:
        S = parts["conditioner"].config.num_queries
        counts = {"conditioner": flops.conditioner(parts["conditioner"].config, S),
                  "mllm": _chat(parts["mllm"].config, prompt)}
    else:
        S = prompt["text_encoder"].shape[1] + prompt.get(
            kontext.T5, prompt["text_encoder"]).shape[1]
        counts = {n: (flops.t5 if n == kontext.T5 else flops.clip)(parts[n].config, ids.shape[1])
                  for n, ids in prompt.items()}
    return counts | {
        "vae": encode * (("target_moments" not in batch)
                         + (edit and "source_moments" not in batch)),
        "transformer": flops.transformer(cfg, T, S, reference=T if edit else 0)}


def _chat(cfg, prompt, logits=0):
    count = flops.language(cfg, prompt["mask"].shape[1], logits=logits)
    if "pictures" in prompt:
        count += flops.vision(cfg.vision, prompt["pictures"]["segments"].shape[1])
    return count
