"""Open a model for use, whichever layout it lies in."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from unipic_jax.convert import convert, store, torch_files
from unipic_jax.core import params
from unipic_jax.core.errors import InputError
from unipic_jax.model import Part, config_file, read_part

HUB = "hf://"
_NANO = Path(__file__).parents[1] / "nano"
SHIPPED = {"nano": _NANO / "kontext", "nano-metaquery": _NANO / "metaquery",
           "nano-qwen2.5-vl": _NANO / "qwen2_5_vl"}
"""What comes with the package: two models that draw and edit, the second with the third, which
answers questions, as its language model."""


def find(model: str) -> Path:
    """The folder of a model: a name of `SHIPPED`, a path, or `hf://owner/name` brought by
    huggingface_hub.

    Raises InputError where there is none.
    """
    if model in SHIPPED and not Path(model).exists():
        return SHIPPED[model]
    if not model.startswith(HUB):
        if not Path(model).is_dir():
            raise InputError(f"{model} is not a folder; give a path or {HUB}owner/name")
        return Path(model)
    name = model.removeprefix(HUB)
    if name.count("/") != 1:
        raise InputError(f"{model} does not name a model; write {HUB}owner/name")
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(name))
    except Exception as e:  # the hub's client has a hierarchy of its own, and its transport's
        raise InputError(f"{model} cannot be fetched: {str(e).strip().splitlines()[0]}") from None


def read(part: Part, dtype=None, mesh: jax.sharding.Mesh | None = None) -> params.Tree:
    """The parameters of a part, in `dtype` (as stored by default), on the mesh or the default
    device. Raises InputError where they do not fit the config."""
    if convert.is_ours(part.folder):
        stored = store.described(part.folder / convert.PARAMS)
        specs = traverse_util.flatten_dict(part.specs, is_leaf=lambda _, s: params.is_spec(s))
        for path, spec in specs.items():
            if stored.get(path, (None,))[0] != spec.shape:
                raise InputError(f"{part.folder} does not fit its config: leaf {'/'.join(path)} "
                                 f"should be {list(spec.shape)}")
        abstract = traverse_util.unflatten_dict({
            p: jax.ShapeDtypeStruct(s.shape, dtype or stored[p][1], sharding=_sharding(mesh, s))
            for p, s in specs.items()})
        return store.restore(part.folder / convert.PARAMS, abstract)
    tensors, _ = torch_files.open_folder(part.folder)
    specs = traverse_util.flatten_dict(part.specs, is_leaf=lambda _, s: params.is_spec(s))
    tree = {}
    for rule, found in convert.match(part, tensors):
        kind = np.dtype(dtype or convert.leaf_type(found))
        tree[rule.path] = jax.device_put(convert.stacked(rule, found, kind),
                                         _sharding(mesh, specs[rule.path]))
    return traverse_util.unflatten_dict(tree)


def _sharding(mesh, spec):
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return params.meshes.sharding(mesh, spec.shape, spec.axes)


class Parts(Mapping):
    """The parts of a model folder by name, their configs read and checked.

    `parts["vae"]` is a `Part`; `parts.load("vae", dtype)` its parameters, which stay in memory
    where `keep` is set and are read anew each time where it is not.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], optional: tuple[str, ...] = (),
                 elsewhere: Mapping[str, Path] = {}, *, keep: bool = False):
        """`elsewhere`: parts by name that lie in folders of their own.

        Raises InputError where a part but an optional one is missing or a config is not supported.
        """
        self.folder = folder
        self._kept = {} if keep else None
        self._parts = {n: read_part(folder / n) for n in names}
        self._parts |= {n: read_part(folder / n) for n in optional if config_file(folder / n)}
        self._parts |= {n: read_part(f) for n, f in elsewhere.items()}

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def load(self, name: str, dtype=None) -> params.Tree:
        if self._kept is None:
            return read(self._parts[name], dtype)
        if (name, dtype) not in self._kept:
            self._kept[name, dtype] = read(self._parts[name], dtype)
        return self._kept[name, dtype]
