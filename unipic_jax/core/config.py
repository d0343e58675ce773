"""A released `config.json` read into a frozen dataclass."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from unipic_jax.core.errors import InputError

T = TypeVar("T")


def read_json(path: Path) -> Any:
    """The content of a JSON file; InputError where it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read as JSON: {e}") from None


def parse(
    cls: type[T], raw: dict, where: str, *, fixed: dict[str, tuple] = {}, ignored: tuple = (),
    signed: tuple = (),
) -> T:
    """The dataclass `cls` from the keys of `raw` that are its fields; lists become tuples.

    `fixed` names keys that are understood at the given values only, `ignored` keys without
    effect on inference, `signed` numbers that may be negative; keys that begin with an underscore
    are library bookkeeping. Raises InputError, naming the key, for any other key, an unsupported
    value or a missing field.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in raw.items():
        if key in fixed and value not in fixed[key]:
            allowed = " or ".join(map(json.dumps, fixed[key]))
            raise InputError(f"{where}: {key} = {json.dumps(value)} is not supported "
                             f"(only {allowed})")
        if key in fields:
            values[key] = _typed(fields[key], value, key, where)
            if _negative(values[key]) and key not in signed:
                raise InputError(f"{where}: {key} = {value} is negative")
        elif key not in fixed and not key.startswith("_") and key not in ignored:
            raise InputError(f"{where}: unknown key {key!r}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{where}: key {name!r} is missing")
    return cls(**values)


def _typed(field, value, key, where):
    if isinstance(value, list):
        value = tuple(value)
    wanted = {"int": int, "float": (int, float), "str": str, "bool": bool}.get(
        getattr(field.type, "__name__", field.type), object)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted in (int, (int, float))):
        raise InputError(f"{where}: {key} = {json.dumps(value)} is not "
                         f"{getattr(field.type, '__name__', field.type)}")
    return value


def _negative(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < 0


# What transformers writes into any config.json and what does not change what a model computes.
TRANSFORMERS_KEYS = (
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "pad_token_id", "output_past", "initializer_factor", "initializer_range",
    "attention_dropout", "dropout", "dropout_rate", "classifier_dropout", "decoder_start_token_id",
    "is_decoder", "add_cross_attention", "task_specific_params", "gradient_checkpointing",
)
