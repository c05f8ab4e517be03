"""Makes functions that read an operand of an instruction from a block, or write it."""

from collections.abc import Callable

import numpy as np

from ptx_emulator.block import WINDOWS, Block
from ptx_emulator.memory import Fault
from ptx_emulator.text import (
    Address,
    Group,
    Not,
    Number,
    Operand,
    Program,
    Register,
    Symbol,
    Unsupported,
)
from ptx_emulator.values import INTEGERS, UNSIGNED, decode, width

Array = np.ndarray

Getter = Callable[[Block], Array]


Setter = Callable[[Block, Array, Array], None]


def bits_of(operand: Operand, bits: int) -> Getter:
    """Returns a reader of an operand as unsigned integers of `bits` bits; 1 for a predicate."""
    if isinstance(operand, Number):
        if bits == 1:
            flag = np.array([operand.value != 0])
            return lambda block: flag
        number = np.array([operand.value & (2**bits - 1)], np.uint64).astype(UNSIGNED[bits])
        return lambda block: number
    if isinstance(operand, Not):
        positive = bits_of(operand.register, bits)
        return lambda block: ~positive(block)
    if isinstance(operand, Symbol):
        name, offset = operand.name, operand.offset

        def symbol(block: Block) -> Array:
            if name in block.registers:
                return block.registers[name]
            if name not in block.symbols:
                raise Unsupported(f"address of {name}")
            return np.array([block.symbols[name] + offset], np.uint64).astype(UNSIGNED[bits])

        return symbol
    if isinstance(operand, Group):
        part = bits // len(operand.items)
        getters = [bits_of(item, part) for item in operand.items]

        def pack(block: Block) -> Array:
            values = np.broadcast_arrays(*(get(block) for get in getters))
            return np.ascontiguousarray(np.stack(values, -1)).view(UNSIGNED[bits])[..., 0]

        return pack
    if not isinstance(operand, Register):
        raise Unsupported(f"operand {operand}")
    name = operand.name
    wanted = np.dtype(bool) if bits == 1 else np.dtype(UNSIGNED[bits])

    def register(block: Block) -> Array:
        try:
            value = block.registers[name]
        except KeyError:
            raise Fault(f"{name} is read before it is written") from None
        return value if value.dtype == wanted else value.astype(wanted)

    return register


def values_of(operand: Operand, type: str) -> Getter:
    """Returns a reader of an operand as values of a type, see `values.decode`."""
    get = bits_of(operand, width(type))
    return lambda block: decode(get(block), type)


def writer_of(operand: Operand, type: str, program: Program) -> Setter:
    """Returns a writer of a type's bits to a register, or of their parts to several."""
    if isinstance(operand, Group):
        part = width(type) // len(operand.items)
        setters = [writer_of(item, f"b{part}", program) for item in operand.items]

        def unpack(block: Block, bits: Array, mask: Array) -> None:
            parts = np.ascontiguousarray(bits)[:, None].view(UNSIGNED[part])
            for i, put in enumerate(setters):
                put(block, np.ascontiguousarray(parts[:, i]), mask)

        return unpack
    if not isinstance(operand, Register):
        raise Unsupported(f"target {operand}")
    if operand.name == "_":
        return lambda block, bits, mask: None
    name, holds = operand.name, program.registers[operand.name]
    size = width(holds)
    if size == 1 or size == width(type):
        return lambda block, bits, mask: block.write(name, bits, mask)
    if size < width(type):
        raise Unsupported(f"{type} into a register of {size} bits")
    signed = type[0] == "s"

    def extend(block: Block, bits: Array, mask: Array) -> None:
        value = bits.view(INTEGERS[type]) if signed else bits
        block.write(name, value.astype(INTEGERS[f"s{size}"]).view(UNSIGNED[size]), mask)

    return extend


def address_of(operand: Operand) -> Getter:
    """Returns a reader of an address operand, uint64 [threads]."""
    if not isinstance(operand, Address):
        raise Unsupported(f"address {operand}")
    base, offset = bits_of(operand.base, 64), np.uint64(operand.offset & (2**64 - 1))
    return lambda block: np.broadcast_to(base(block) + offset, (block.count,))


def space_of(opcode: tuple[str, ...]) -> str:
    words = [word.split("::")[0] for word in opcode]
    return next((w for w in words if w in WINDOWS), "generic")
