"""Instructions that load, store and copy: ld, st, cp.async, ldmatrix, stmatrix, atom, red."""

from collections.abc import Callable

import numpy as np

from ptx_emulator.block import SHARED_WINDOW, AsyncCopy, Block
from ptx_emulator.form import Form, check_whole_warps, together
from ptx_emulator.memory import Fault, Memory, Shared
from ptx_emulator.operands import address_of, bits_of, space_of, writer_of
from ptx_emulator.text import Address, Group, Instruction, Operand, Program, Symbol, Unsupported
from ptx_emulator.values import ATOMIC, UNSIGNED, decode, encode, gather, spread, width

Array = np.ndarray


def vector_length(i: Instruction) -> int:
    return next((int(w[1:]) for w in i.opcode if w in ("v2", "v4", "v8")), 1)


def ld_instruction(i: Instruction, program: Program) -> Form:
    type, count, space = i.opcode[-1], vector_length(i), space_of(i.opcode)
    size = width(type) // 8
    items = i.operands[0].items if count > 1 else (i.operands[0],)  # type: ignore[union-attr]
    setters = [writer_of(item, type, program) for item in items]
    address = i.operands[1]
    if space == "param":
        load: Callable[[Block, Array], Array] = _parameter(address, size * count)
    else:
        where = address_of(address)

        def load(block: Block, threads: Array) -> Array:
            return block.read(space, where(block)[threads], size * count, threads)

    def work(block: Block, mask: Array) -> None:
        threads = np.flatnonzero(mask)
        raw = load(block, threads)
        for part, put in enumerate(setters):
            bits = np.zeros(block.count, UNSIGNED[size * 8])
            piece = np.ascontiguousarray(raw[:, part * size : (part + 1) * size])
            bits[threads] = piece.view(UNSIGNED[size * 8])[:, 0]
            put(block, bits, mask)

    return Form(work)


def _parameter(address: Operand, size: int) -> Callable[[Block, Array], Array]:
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise Unsupported("address of a parameter")
    name, at = address.base.name, address.offset

    def load(block: Block, threads: Array) -> Array:
        values = block.parameters[name]
        if not 0 <= at <= values.shape[1] - size:
            raise Fault(f"byte {at} of parameter {name}")
        return values[threads, at : at + size]

    return load


def st_instruction(i: Instruction, program: Program) -> Form:
    type, count, space = i.opcode[-1], vector_length(i), space_of(i.opcode)
    bits = width(type)
    values = i.operands[1]
    items = values.items if count > 1 else (values,)  # type: ignore[union-attr]
    getters = [bits_of(item, bits) for item in items]

    def raw(block: Block, threads: Array) -> Array:
        parts = [np.broadcast_to(get(block), (block.count,))[threads] for get in getters]
        return np.ascontiguousarray(np.stack(parts, 1)).view(np.uint8)

    target = i.operands[0]
    if space == "param":
        name, at = target.base.name, target.offset  # type: ignore[union-attr]

        def keep(block: Block, mask: Array) -> None:
            threads = np.flatnonzero(mask)
            block.parameters[name][threads, at : at + count * bits // 8] = raw(block, threads)

        return Form(keep)
    where = address_of(target)

    def work(block: Block, mask: Array) -> None:
        threads = np.flatnonzero(mask)
        block.store(space, where(block)[threads], raw(block, threads), threads)

    return Form(work)


def param_instruction(i: Instruction, program: Program) -> Form:
    target, source = (o.name for o in i.operands)  # type: ignore[union-attr]

    def work(block: Block, mask: Array) -> None:
        block.parameters[target][mask] = block.parameters[source][mask]

    return Form(work)


def cp_instruction(i: Instruction, program: Program) -> Form:
    words = i.opcode[1:]
    if words == ("async", "commit_group"):

        def commit(block: Block, mask: Array) -> None:
            block.groups = block.groups + mask

        return Form(commit)
    if words[:2] in (("async", "wait_group"), ("async", "wait_all")):
        pending = i.operands[0].value if i.operands else None  # type: ignore[union-attr]
        return Form(lambda block, mask: block.land(mask, pending))
    if words[0] != "async" or words[1] not in ("ca", "cg"):
        raise Unsupported("form")
    where, origin = address_of(i.operands[0]), address_of(i.operands[1])
    size = i.operands[2].value  # type: ignore[union-attr]
    if size not in ({"cg": (16,), "ca": (4, 8, 16)}[words[1]]):
        raise Unsupported("size")
    extra = i.operands[3:] if not any("cache_hint" in w for w in words) else i.operands[3:-1]
    ignores = bool(extra) and program.registers.get(getattr(extra[0], "name", "")) == "pred"
    length = bits_of(extra[0], 1 if ignores else 32) if extra else None

    def work(block: Block, mask: Array) -> None:
        threads = np.flatnonzero(mask)
        valid = np.full(block.count, size)
        if length is not None:
            given = np.broadcast_to(length(block), (block.count,))
            valid = np.where(given, 0, size) if ignores else given.astype(np.int64)
            if (valid > size).any():
                raise Fault("source larger than the copy")
        values = np.zeros((block.count, size), np.uint8)
        for amount in np.unique(valid[threads]):
            some = threads[valid[threads] == amount]
            if amount == size:
                values[some] = block.read("global", origin(block)[some], size, some)
            for byte in range(amount if amount < size else 0):
                at = origin(block)[some] + np.uint64(byte)
                values[some, byte] = block.read("global", at, 1, some)[:, 0]
        addresses = where(block)
        block.shared.launch(addresses[threads], size, threads)
        block.copies.append(AsyncCopy(mask.copy(), block.groups, addresses, values))

    return Form(work)


def ldmatrix_stmatrix(i: Instruction, program: Program) -> Form:
    words = i.opcode
    transposed = "trans" in words
    loads = words[0] == "ldmatrix"
    registers, address = i.operands if loads else i.operands[::-1]
    items = registers.items if isinstance(registers, Group) else (registers,)
    count = {"x1": 1, "x2": 2, "x4": 4}[next(w for w in words if w[0] == "x")]
    if "m8n8" not in words or words[-1] != "b16" or len(items) != count:
        raise Unsupported("form")
    space, where = space_of(words), address_of(address)
    setters = [writer_of(o, "b32", program) for o in items] if loads else []
    getters = [] if loads else [bits_of(o, 32) for o in items]

    def place(block: Block, mask: Array) -> tuple[Array, Array, Array]:
        check_whole_warps(mask)
        threads = np.flatnonzero(mask & (block.threads % 32 < 8 * count))
        addresses = where(block)[threads]
        if space == "generic":
            addresses = addresses - np.uint64(SHARED_WINDOW)
        return np.unique(threads // 32), threads, addresses

    def load(block: Block, mask: Array) -> None:
        warps, threads, addresses = place(block, mask)
        raw = block.shared.read(addresses, 16, threads, together=True)
        out = spread(raw.view(np.uint16).reshape(len(warps), count, 8, 8), transposed)
        for matrix, put in enumerate(setters):
            bits = np.zeros((block.warps, 32), np.uint32)
            bits[warps] = out[:, matrix]
            put(block, bits.reshape(-1), mask)

    def store(block: Block, mask: Array) -> None:
        warps, threads, addresses = place(block, mask)
        parts = [np.broadcast_to(get(block), (block.count,)).reshape(-1, 32) for get in getters]
        rows = gather(np.stack(parts, 1)[warps], transposed).reshape(-1, 8)
        block.shared.write(addresses, np.ascontiguousarray(rows).view(np.uint8), threads)

    return Form(load if loads else store, needed=together)


def atom_instruction(i: Instruction, program: Program) -> Form:
    type, space = i.opcode[-1], space_of(i.opcode)
    name = next(w for w in i.opcode[1:] if w in ATOMIC or w == "cas")
    if vector_length(i) > 1:
        raise Unsupported("vector")
    returns = i.opcode[0] == "atom"
    operands = i.operands[1:] if returns else i.operands
    put = writer_of(i.operands[0], type, program) if returns else None
    where, sources = address_of(operands[0]), [bits_of(o, width(type)) for o in operands[1:]]
    size = width(type) // 8
    if len(sources) != (2 if name == "cas" else 1):
        raise Unsupported("form")

    def work(block: Block, mask: Array) -> None:
        old = np.zeros(block.count, UNSIGNED[size * 8])
        addresses = where(block)
        given = [np.broadcast_to(get(block), (block.count,)) for get in sources]
        for thread in np.flatnonzero(mask):
            one = slice(thread, thread + 1)
            for memory, _, at in block.places(space, addresses[one]):
                before = Memory.read(memory, at, size, block.threads[one]).view(old.dtype)[:, 0]
                old[one] = before
                if name == "cas":
                    new = np.where(before == given[0][one], given[1][one], before)
                else:
                    values = decode(before, type), decode(given[0][one], type)
                    new = encode(ATOMIC[name](*values), type)
                Memory.write(memory, at, new.view(np.uint8)[None], block.threads[one])
                if isinstance(memory, Shared):
                    memory.mark(at, size, block.threads[one])
        if put:
            put(block, old, mask)

    return Form(work)
