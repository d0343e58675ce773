"""The fields of a stage's config, with what most stages take for them."""

import dataclasses
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from unipic_jax.core.errors import InputError
from unipic_jax.data import buckets
from unipic_jax.train import optimizer


def defaults() -> ConfigDict:
    """A config that says what each field means; `configs/` has one file a stage."""
    return ConfigDict({
        # Or "answer" (the language model), "reconstruction" (the autoencoder), "judgement" (the
        # judge of edits).
        "objective": "velocity",
        "model": "",  # a folder in either layout or hf://owner/name, as `--model`
        "mllm": "",  # the folder of Qwen2.5-VL: the prompts go through MetaQuery
        "judge": "",  # a folder with the head of an edit judge in judge/
        "conditioner": "",  # its folder, where it is not in the model's
        "trained": (),  # parts by their folders' names; the others are frozen, in `dtype`
        "fresh": (),  # of these the ones that begin from nothing
        "int8": (),  # of those that are frozen, parts whose weights are kept as integers
        # Of those, parts that every device holds whole along `fsdp`: faster, where there is memory.
        "whole": (),
        "lora": {"rank": 0, "alpha": 64.0, "targets": ()},  # rank 0: the weights themselves train
        # MetaQuery: who sees the picture of an edit (table 2 of the report).
        "source_to": ("mllm", "transformer"),
        "three_axis_rope": False,  # MetaQuery: as `unipic edit` has it, and as released
        "newline_after_picture": False,
        "data": {
            "sources": {},  # by any name: "weight", "kind" and what `data.sources` takes
            "pixels": 512 * 512,  # of a picture, whatever its shape
            "ratios": buckets.RATIOS,
            "text_tokens": 128,  # of a prompt to the language model; the rest is cut off
            "caption_dropout": 0.1,  # of captions that become "", for guidance
            "workers": 8,  # processes that decode pictures; 0 for threads
        },
        "blank_answers": 0.0,  # of chats whose answers are learned without what was said before
        "batch": 128,  # samples a step, on all devices
        "micro_batches": 1,  # parts of it whose gradients are summed one after the other
        "steps": 200_000,
        "seed": 0,
        "optimizer": dataclasses.asdict(optimizer.Config()),
        "ema": 0.0,  # decay of the parameters' mean, which is then what is saved as the model
        "dtype": "bfloat16",  # of what is computed, and of what is frozen
        "save_dtype": "bfloat16",  # of the model that is written at the end
        "remat": "attention",  # see `core.remat`
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        "log_every": 50,
        "checkpoint": {"every": 1000, "keep": 2, "keep_every": 0},
        # Pictures drawn now and then: of so many examples a task. `blocks` scores the model on so
        # many held-out examples of each kind of the embedded world.
        "samples": {"every": 5000, "at_start": False, "count": 8, "blocks": 0, "steps": 28,
                    "guidance_scale": 3.5,
                    "judged": ""},  # shards of scored edits that a judge is tested on
        "max_skipped": 10,  # steps in a row that are not finite, after which the run stops
    })


def nano(**shares: float) -> ConfigDict:
    """The defaults for the nano family on the blocks world: a share of the batches for each task,
    float32, and rates for small models from nothing."""
    config = defaults()
    for task, share in shares.items():
        config.data.sources[task] = {"kind": "blocks", "task": task, "seed": 0,
                                     "length": 1_000_000, "weight": share}
    config.data.update({"pixels": 48 * 48, "ratios": ((1, 1),), "text_tokens": 24, "workers": 0})
    config.batch = 64
    config.optimizer.update({"learning_rate": 1e-3, "warmup": 0.02, "b2": 0.99, "muon": True})
    config.ema = 0.999
    config.dtype = config.save_dtype = "float32"
    config.remat = "none"
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.log_every = 20
    config.checkpoint.every = 500
    config.samples.update({"every": 1000, "steps": 20, "guidance_scale": 1.5, "blocks": 16})
    return config


def read(arguments: list[str]) -> ConfigDict:
    """The config of `--config=FILE [--config.a.b=value ...]`.

    Raises InputError where the file is missing or fails, or a field is not known.
    """
    values, line = flags.FlagValues(), ["unipic", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line)
    try:
        values(line)
        config = values.config
        if config is not None:
            config.keys()  # here it says that there is no file
    except flags.Error as e:
        raise InputError(str(e).replace("\n", " ")) from None
    except OSError:
        raise InputError(f"{' '.join(arguments)}: there is no such config file") from None
    except Exception as e:  # whatever the file itself raises
        raise InputError(f"{' '.join(arguments)}: {type(e).__name__}: {e}") from None
    if config is None:
        raise InputError("give a config: --config=configs/NAME.py")
    return config


def write(config: ConfigDict, path: Path) -> None:
    """The config as JSON."""
    path.write_text(config.to_json_best_effort(indent=1) + "\n", encoding="utf-8")
