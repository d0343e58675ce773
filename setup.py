"""Package of unipic_jax; `pip install .` brings the `unipic` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "unipic_jax/__init__.py").read_text())[1]

setup(
    name="unipic_jax",
    version=VERSION,
    description="Skywork UniPic 2.0 in JAX: generate, edit, train and convert",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["unipic_jax", "unipic_jax.*"]),
    package_data={"unipic_jax": ["nano/**/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "array_record>=0.8.6",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # which tensorflow-datasets needs and does not require
        "ml-collections>=1.1",
        "msgpack",
        "pyarrow",
        "tensorboardX",
        "transformers>=5",
        "huggingface_hub",
        "jinja2",
        "ml_dtypes",
        "numpy",
        "pillow>=11",
        "tqdm",
    ],
    extras_require={
        "int8": ["qwix"],  # frozen weights as integers
        "tpu": ["jax[tpu]"],  # also compiles for TPUs where there are none
        # The PyTorch code that the results are compared with; nothing else imports it.
        "test": ["torch==2.13.0", "diffusers>=0.42", "accelerate", "peft>=0.21", "qwix",
                 "safetensors", "pytest", "pytest-xdist", "pyyaml", "ruff"],
    },
    entry_points={"console_scripts": ["unipic=unipic_jax.cli:main"]},
)
