"""The parts of a model by name: what each folder of a release holds."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

from unipic_jax.core import params
from unipic_jax.core.config import read_json
from unipic_jax.core.errors import InputError
from unipic_jax.flow import schedule
from unipic_jax.models import (
    autoencoder,
    clip_text,
    connector,
    edit_judge,
    mmdit,
    qwen2_5_vl,
    t5_encoder,
)

CLASSES = {  # the class that a config.json names -> the module that stands for it
    "SD3Transformer2DKontextModel": mmdit,
    "SD3Transformer2DModel": mmdit,
    "AutoencoderKL": autoencoder,
    "CLIPTextModelWithProjection": clip_text,
    "T5EncoderModel": t5_encoder,
    "StableDiffusion3Conditioner": connector,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "EditJudge": edit_judge,
    "FlowMatchEulerDiscreteScheduler": schedule,
}
CONFIG_FILES = ("config.json", "scheduler_config.json")


@dataclasses.dataclass(frozen=True)
class Part:
    """A folder of a release: its module, its config, and where it lies."""

    folder: Path
    module: ModuleType
    config: Any
    whole: bool = False  # not split along `fsdp`, so that nothing is gathered at each use

    @property
    def specs(self) -> params.Tree:
        specs = self.module.specs(self.config)
        return params.whole(specs) if self.whole else specs

    @property
    def has_weights(self) -> bool:
        return hasattr(self.module, "specs")


def config_file(folder: Path) -> Path | None:
    """The config file of a part, or None where the folder is not one (a tokenizer, say)."""
    return next((folder / f for f in CONFIG_FILES if (folder / f).is_file()), None)


def read_part(folder: Path) -> Part:
    """The part in `folder`, by its config file.

    Raises InputError where there is none, where it names a class that is not known, or where a
    value in it is not supported.
    """
    file = config_file(folder)
    if file is None:
        missing = "is missing" if not folder.is_dir() else "has no config.json"
        raise InputError(f"{folder} {missing}")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(f"{file} is not an object")
    named = raw.get("_class_name") or (raw.get("architectures") or [None])[0]
    if named not in CLASSES:
        raise InputError(f"{file} names the class {named!r}; known are {', '.join(CLASSES)}")
    return Part(folder, CLASSES[named], CLASSES[named].Config.from_json(raw, str(file)))
