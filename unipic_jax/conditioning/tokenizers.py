"""Tokenizers of model folders."""

import functools
import os
from pathlib import Path

from unipic_jax.core.errors import InputError

FILES = ("tokenizer.json", "vocab.json", "spiece.model")  # one of which holds the vocabulary


@functools.lru_cache(maxsize=8)
def open_tokenizer(folder: Path):
    """transformers' tokenizer of the files in `folder`.

    Raises InputError where it is missing or cannot be opened.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not folder.is_dir():
        raise InputError(f"{folder} is missing")
    if not any((folder / name).is_file() for name in FILES):
        raise InputError(f"{folder} has no tokenizer (no {', '.join(FILES)})")
    # A tokenizer.json says everything itself; only without it is the class needed.
    cls = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return cls.from_pretrained(folder)
    except Exception as e:  # many kinds, from missing files to a missing library
        raise InputError(f"{folder} cannot be opened as a tokenizer: "
                         f"{str(e).strip().splitlines()[0]}") from None
