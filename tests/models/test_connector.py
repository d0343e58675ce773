"""The connector against the golden."""

import jax
import jax.numpy as jnp
from conftest import GOLDENS, relative

from unipic_jax.convert import load
from unipic_jax.model import read_part
from unipic_jax.models import connector


def test_connector_equals_golden(golden):
    part = read_part(GOLDENS / "metaquery" / "conditioner")
    params = load.read(part, jnp.float32)
    context, pooled = jax.jit(connector.apply, static_argnums=0)(
        part.config, params, golden["conditioner/in"])
    assert relative(context, golden["conditioner/embeds"]) < 1e-5
    assert relative(pooled, golden["conditioner/pooled"]) < 1e-5
