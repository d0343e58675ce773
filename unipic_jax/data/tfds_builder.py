"""Our records as a TFDS data set, written and read without TensorFlow."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from unipic_jax.core.files import new_folder
from unipic_jax.data import records
from unipic_jax.data.records import Record

NAME = "unipic_examples"


class UnipicExamples(tfds.core.GeneratorBasedBuilder):
    """Pictures are the bytes of PNG, JPEG or WebP files; a field that is not there is empty.
    Of a chat it holds the first question and answer."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, examples: dict[str, Iterable[Record]] = {}, **kwargs):
        """examples: the records of each split, where the data set is to be written."""
        super().__init__(**kwargs)
        self._examples = examples

    def _info(self):
        picture, text = tfds.features.Tensor(shape=(), dtype=np.object_), tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "name": text, "target": picture, "source": picture, "text": text, "answer": text}))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(found) for split, found in self._examples.items()}

    def _generate_examples(self, found):
        for i, record in enumerate(found):
            records.check(record)
            yield i, {"name": record.name, "target": record.target or b"",
                      "source": record.source or b"", "text": record.text,
                      "answer": record.answer or ""}


def write(folder: Path, examples: Iterable[Record], split: str = "train") -> None:
    """Write records as the data set `unipic_examples` in a new TFDS folder, all or nothing.

    Raises InputError where the folder exists or the disk is full.
    """
    with new_folder(folder) as partial:
        builder = UnipicExamples(data_dir=partial, file_format="array_record",
                                 examples={split: examples})
        try:
            builder.download_and_prepare()
        except RuntimeError as e:  # how the writer says that the disk is full
            raise OSError(str(e).split(";")[0]) from None
