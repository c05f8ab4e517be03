"""Selects columns of a 4-bit matrix without decoding the others, for rows of an embedding."""

import dataclasses

import jax
import jax.numpy as jnp

from qlora_jax.quant.qtensor import QTensor


def columns(q: QTensor, index: jax.Array) -> QTensor:
    """Returns some columns of a matrix; they decode to the same values as in the whole matrix.

    Args:
      q: one matrix [K, N].
      index: column numbers from 0 to N - 1, int[m].

    Returns:
      The columns, [K, m].
    """
    blocks = q.scales.shape[0]
    nested, nested_block = q.nested, q.nested_block
    if nested is not None:
        # One nested scale may serve scales of several columns, so give each scale a copy.
        place = index[:, None] * blocks + jnp.arange(blocks)
        nested, nested_block = nested[place.reshape(-1) // nested_block], 1
    return dataclasses.replace(
        q,
        codes=q.codes[:, index],
        scales=q.scales[:, index],
        nested=nested,
        nested_block=nested_block,
    )
