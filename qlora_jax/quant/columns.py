"""Some columns of a 4-bit matrix, taken without decoding the others: rows of an embedding."""

import dataclasses

import jax
import jax.numpy as jnp

from qlora_jax.quant.qtensor import QTensor


def columns(q: QTensor, index: jax.Array) -> QTensor:
    """Takes columns out of one matrix; they decode to what they decode to in the whole.

    Args:
      q: one matrix [K, N].
      index: int[m], from 0 to N - 1.

    Returns:
      [K, m].
    """
    blocks = q.scales.shape[0]
    nested, nested_block = q.nested, q.nested_block
    if nested is not None:
        # the scales of a block of scales may be those of several columns: one for each scale
        place = index[:, None] * blocks + jnp.arange(blocks)
        nested, nested_block = nested[place.reshape(-1) // nested_block], 1
    return dataclasses.replace(
        q,
        codes=q.codes[:, index],
        scales=q.scales[:, index],
        nested=nested,
        nested_block=nested_block,
    )
