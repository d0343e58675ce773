"""Cached posteriors and contexts: they are what the encoders make, and only of these encoders."""

import jax
import micro
import pytest
from conftest import relative

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.data import feed
from unipic_jax.data.shards import Shards
from unipic_jax.train import loop, stage


@pytest.fixture(scope="module")
def cached(micro_model, tmp_path_factory):
    """A stage's config on blocks, and the same on what `unipic cache` made of them."""
    root = tmp_path_factory.mktemp("cache")
    config = micro.point(micro.get_config(), micro_model)
    config.data.caption_dropout = 0.5
    for spec in config.data.sources.values():
        spec.length = 12  # which leaves a batch that is not full
    counts = loop.encode(config, root / "shards", contexts=True, progress=False)
    assert counts == {"generate": 12, "edit": 12}
    there = config.copy_and_resolve_references()
    for name in counts:
        there.data.sources[name] = {"kind": "shards", "path": str(root / "shards" / name),
                                    "weight": 1.0}
    return config, there


def opened(config):
    mesh = meshes.make(**config.mesh)
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        trained, frozen = stage.parameters(config, here, mesh)
        return here, trained, frozen, loop.Data(config, here, frozen, mesh)


def test_cached_arrays_are_what_the_encoders_make(cached):
    config, there = cached
    here, trained, frozen, plain = opened(config)
    *_, kept = opened(there)
    mesh = meshes.make(**config.mesh)
    loss = jax.jit(here.loss, compiler_options=micro.QUICK)
    keys = feed.to_device(mesh, jax.random.split(jax.random.key(0), config.batch))
    for (task, batch), (same, with_caches), _ in zip(
            plain.batches(seed=3), kept.batches(seed=3), range(4)):
        assert task == same
        assert set(with_caches["prompt"]) == {"context", "pooled"}
        assert "target_moments" in with_caches
        with jax.set_mesh(mesh):
            a, b = (loss(trained, frozen, feed.to_device(mesh, x), keys)[0]
                    for x in (batch, with_caches))
        assert relative(b, a) < 1e-2  # moments are kept in float16, contexts in bfloat16


def test_other_encoders_are_refused(cached):
    _, there = cached
    there = there.copy_and_resolve_references()
    assert Shards(there.data.sources.edit.path).encoder
    there.dtype = "bfloat16"  # in which the encoders make something else
    with pytest.raises(InputError, match="was encoded by other parameters"):
        opened(there)


def test_what_trains_cannot_be_kept(cached):
    _, there = cached
    there = there.copy_and_resolve_references()
    there.trained = ("transformer", "text_encoder")
    with pytest.raises(InputError, match="text_encoder trains in this stage"):
        opened(there)
