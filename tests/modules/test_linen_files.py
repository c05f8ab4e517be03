"""Adapters of a Linen module in a folder; an NNX model with the same paths can load it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_models import trained
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax import UserError

pytestmark = pytest.mark.quick

X = jax.random.normal(jax.random.key(0), (3, 64))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="down")(nn.relu(nn.Dense(64, name="up")(x)))


class TwoNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


MODULE = Two()


def base():
    return qj.linen.quantize(MODULE, MODULE.init(jax.random.key(1), X)["params"], ".*kernel", X)


def adapted(variant="lora", rank=4):
    params = qj.linen.add_lora(
        MODULE, base(), ".*kernel", key=jax.random.key(2), rank=rank, variant=variant
    )
    parts, frozen = qj.linen.split(params)
    parts = {name: x + 0.05 if name.endswith(".b") else x for name, x in parts.items()}
    return qj.linen.join(parts, frozen)


@pytest.mark.parametrize("variant", mostly_slow(["lora", "dora"], "lora"))
def test_round_trip(variant, tmp_path):
    params = adapted(variant)
    qj.linen.save_adapter(params, tmp_path / "a")
    expected = qj.linen.apply(MODULE, params, X)
    loaded = qj.linen.load_adapter(MODULE, base(), tmp_path / "a")
    np.testing.assert_array_equal(qj.linen.apply(MODULE, loaded, X), expected)
    plain = MODULE.init(jax.random.key(1), X)["params"]
    loaded = qj.linen.load_adapter(MODULE, plain, tmp_path / "a", X, name="other")
    with pytest.raises(UserError, match="the model has default; give the name of one"):
        qj.linen.save_adapter(params, tmp_path / "b", "other")
    again = qj.linen.load_adapter(MODULE, loaded, tmp_path / "a", name="other")
    np.testing.assert_array_equal(
        qj.linen.apply(MODULE, again, X), qj.linen.apply(MODULE, loaded, X)
    )


def test_nnx_reads_the_same_folder(tmp_path):
    qj.linen.save_adapter(adapted(), tmp_path / "a")
    model = TwoNnx(nnx.Rngs(0))
    for name, own in base().items():
        getattr(model, name).kernel.set_value(own["kernel"].plain())
        getattr(model, name).bias.set_value(own["bias"])
    qj.load_adapter(model, tmp_path / "a")
    np.testing.assert_allclose(model(X), qj.linen.apply(MODULE, adapted(), X), atol=2e-6)
    qj.save_adapter(trained(model), tmp_path / "b")
    params = qj.linen.load_adapter(MODULE, base(), tmp_path / "b")
    np.testing.assert_allclose(qj.linen.apply(MODULE, params, X), model(X), atol=2e-6)


def test_refused(tmp_path):
    qj.linen.save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(UserError, match="of another rank or variant"):
        qj.linen.load_adapter(MODULE, adapted(rank=8), tmp_path / "a")
    other = nn.Dense(8)
    params = other.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    with pytest.raises(UserError, match=r"up.kernel is \(64, 64\) in the adapter and not in the"):
        qj.linen.load_adapter(other, params, tmp_path / "a")
    with pytest.raises(UserError, match="the model has no adapter"):
        qj.linen.save_adapter(base(), tmp_path / "b")
