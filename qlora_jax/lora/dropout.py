"""Keys for the dropout of an adapter whose module is not given any."""

import jax
import jax.numpy as jnp
from flax import nnx


class LoraKey(nnx.Variable):
    """A key for dropout, or the number of keys that were drawn from it."""


class DropoutKeys(nnx.Module):
    """A stream of keys for each layer of a stack, as `nnx.Dropout` has one.

    Attributes:
      key: uint32[*stack, 2].
      count: uint32[*stack], keys drawn.
      deterministic: whether nothing is dropped; set by `eval()` and `train()` of the model.
    """

    def __init__(self, key: jax.Array, stack: tuple[int, ...]):
        data = jax.random.key_data(jax.random.split(key, stack))
        self.key = LoraKey(data)
        self.count = LoraKey(jnp.zeros(stack, jnp.uint32))
        self.deterministic = False

    def draw(self) -> jax.Array | None:
        """Returns the next key of each layer, uint32[*stack, 2]; None if nothing is dropped."""
        if self.deterministic:
            return None
        count = self.count.get_value()
        fold = jax.random.fold_in
        for _ in range(count.ndim):
            fold = jax.vmap(fold)
        key = fold(self.key.get_value(), count)
        self.count.set_value(count + 1)
        return key
