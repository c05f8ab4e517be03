"""Parses PTX text into instructions, resolves scopes, and inlines device functions."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator


class PtxError(Exception):
    """PTX that the emulator cannot run, or that is wrong on a GPU."""


class Unsupported(PtxError):
    """An instruction, or a variant of an instruction, that the emulator does not know."""


@dataclasses.dataclass(frozen=True)
class Register:
    name: str


@dataclasses.dataclass(frozen=True)
class Number:
    """An integer, or the bits of a floating-point constant."""

    value: int


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A variable, a parameter, a function or a label."""

    name: str
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Address:
    base: "Register | Symbol | Number"
    offset: int


@dataclasses.dataclass(frozen=True)
class Group:
    """`{a, b}`, `(a, b)` or `a|b`."""

    items: tuple["Operand", ...]


@dataclasses.dataclass(frozen=True)
class Not:
    register: Register


Operand = Register | Number | Symbol | Address | Group | Not


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      text: source text, for messages.
      guard: predicate of the instruction; None if there is none.
      opcode: words between the dots, such as ("ld", "global", "v4", "b32").
      operands: operands in the order of the source.
      scope: numbers of the enclosing `{}` blocks, outermost first.
    """

    text: str
    guard: Register | Not | None
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    scope: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable or parameter.

    Attributes:
      name: name, unique in the program.
      space: state space: "global", "const", "shared", "local" or "param".
      size: size in bytes; None for dynamic shared memory, whose size the launch gives.
      align: alignment in bytes.
      element: bytes of one element.
      values: initial values of the elements; None if not given.
    """

    name: str
    space: str
    size: int | None
    align: int
    element: int
    values: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel with its device functions inlined.

    Attributes:
      name: name of the kernel.
      parameters: parameters of the kernel, in order.
      registers: type of each register, by name.
      variables: all variables and parameters except those of the kernel.
      instructions: code of the kernel.
      labels: index into `instructions`, by unique name.
    """

    name: str
    parameters: tuple[Variable, ...]
    registers: dict[str, str]
    variables: tuple[Variable, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_HEADER = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(entry|func)\b\s*(\([^)]*\))?\s*([\w$]+)\s*"
    r"(\([^)]*\))?([^{;]*)([{;])"
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_NAME = re.compile(r"%?[A-Za-z_$][\w$]*(?:\.[xyzw])?")
_TYPE = re.compile(r"\.(?:pred|[busf](?:8|16|32|64))\b")
# LLVM prints arrays of length 0 without brackets, so MLIR's dynamic shared memory is found by name.
_DYNAMIC = re.compile(r"__dynamic_shmem__")


def parse(ptx: str, entry: str | None = None) -> Program:
    """Parses a module; returns its kernel `entry`, or its only kernel if `entry` is None.

    Raises:
      PtxError: the text is invalid, or `entry` is None and there are several kernels or none.
      Unsupported: the emulator does not know a statement.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", ptx, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*", "", text, flags=re.M)
    text = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", text)
    functions: dict[str, _Function] = {}
    outside, at = [], 0
    while header := _HEADER.search(text, at):
        outside.append(text[at : header.start()])
        at = header.end()
        kind, first, name, second, _, ends = header.groups()
        if ends == "{":
            at = _closing(text, header.end() - 1)
            body = text[header.end() : at - 1]
            functions[name] = _Function(kind == "entry", first, second, body)
    outside.append(text[at:])
    module = tuple(
        variable
        for statement in "".join(outside).split(";")
        if (variable := _variable(statement, lambda name: name))
    )
    entries = [name for name, function in functions.items() if function.is_entry]
    if entry is None and len(entries) != 1:
        raise PtxError(f"name one of the entries: {', '.join(entries)}")
    return _Reader(functions, module).program(entry or entries[0])


@dataclasses.dataclass(frozen=True)
class _Function:
    is_entry: bool
    first: str | None
    second: str | None
    body: str


def _closing(text: str, at: int) -> int:
    """Returns the position after the end of the block that begins at `at`."""
    depth = 0
    for match in re.finditer(r"[{}]", text[at:]):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return at + match.end()
    raise PtxError("a block does not end")


def _split(text: str) -> list[str]:
    """Splits at the commas that no bracket encloses; returns the parts that are not empty."""
    parts, depth, last = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            parts.append(text[last:i])
            last = i + 1
    return [part.strip() for part in (*parts, text[last:]) if part.strip()]


def _variable(statement: str, unique: Callable[[str], str]) -> Variable | None:
    match = re.search(r"\.(global|const|shared|local|param)\b(.*)", statement, re.S)
    if not match or not (kind := _TYPE.search(match[2])):
        return None
    declared, _, initial = match[2].partition("=")
    name = re.search(r"([\w$%]+)\s*(\[\s*(\d*)\s*\])?\s*$", declared)
    if not name:
        raise PtxError(f"not understood: {statement.strip()}")
    element = int(re.search(r"\d+", kind[0])[0]) // 8  # type: ignore[index]
    align = re.search(r"\.align\s+(\d+)\s+\.[busf]\d", declared)
    count = int(name[3] or 0) if name[2] else 1
    dynamic = match[1] == "shared" and (not count or _DYNAMIC.match(name[1]))
    return Variable(
        unique(name[1]),
        match[1],
        None if dynamic else element * count,
        int(align[1]) if align else element,
        element,
        tuple(int(v, 0) for v in re.findall(r"-?\w+", initial)) if initial.strip() else None,
    )


class _Reader:
    def __init__(self, functions: dict[str, _Function], module: tuple[Variable, ...]) -> None:
        self.functions = functions
        self.numbers = itertools.count()
        self.registers: dict[str, str] = {}
        self.variables = list(module)
        self.instructions: list[Instruction] = []
        self.labels: dict[tuple[tuple[int, ...], str], int] = {}
        self.calls: list[str] = []

    def program(self, entry: str) -> Program:
        parameters = self.body(entry, (), ())[0]
        at = {f"{name}#{scope[-1]}": i for (scope, name), i in self.labels.items()}
        code = tuple(map(self.jump, self.instructions))
        return Program(entry, parameters, self.registers, tuple(self.variables), code, at)

    def jump(self, instruction: Instruction) -> Instruction:
        """Returns a branch with its label replaced by the label's unique name."""
        if instruction.opcode[0] != "bra":
            return instruction
        name = instruction.operands[0].name  # type: ignore[union-attr]
        for depth in range(len(instruction.scope), 0, -1):
            if (scope := (instruction.scope[:depth], name)) in self.labels:
                unique = Symbol(f"{name}#{scope[0][-1]}")
                return dataclasses.replace(instruction, operands=(unique,))
        raise PtxError(f"no label for: {instruction.text}")

    def body(
        self, name: str, results: tuple[Operand, ...], arguments: tuple[Operand, ...]
    ) -> tuple[tuple[Variable, ...], tuple[Variable, ...]]:
        """Appends a function's code to the instructions; returns its parameters and results."""
        if name not in self.functions:
            raise Unsupported(f"call of {name}, which the module does not define")
        if name in self.calls:
            raise Unsupported(f"{name} calls itself")
        function = self.functions[name]
        scope = (next(self.numbers),)
        names: list[dict[str, str]] = [{}]

        def unique(name: str) -> str:
            names[-1][name] = f"{name}#{scope[-1]}"
            return names[-1][name]

        def resolve(name: str) -> Register | Symbol:
            name = next((n[name] for n in reversed(names) if name in n), name)
            is_register = name in self.registers or name == "_" or name.startswith("%")
            return Register(name) if is_register else Symbol(name)

        def formal(text: str | None) -> tuple[Variable, ...]:
            parts = _split((text or "()").strip()[1:-1])
            return tuple(v for part in parts if (v := _variable(part, unique)))

        first, second = formal(function.first), formal(function.second)
        inputs, outputs = (second, first) if function.second is not None else (first, ())
        if not function.is_entry:
            self.variables += [*inputs, *outputs]
            for variable, argument in zip(inputs, arguments, strict=True):
                self.copy(variable.name, argument)
        self.calls.append(name)
        for kind, text in _statements(function.body):
            if kind == "{":
                scope = (*scope, next(self.numbers))
                names.append({})
            elif kind == "}":
                scope = scope[:-1]
                names.pop()
            elif kind == "label":
                self.labels[scope, text] = len(self.instructions)
            elif text.startswith(".reg"):
                self.declare(text, unique)
            elif text.startswith("."):
                if variable := _variable(text, unique):
                    self.variables.append(variable)
                elif not text.startswith(".pragma"):
                    raise Unsupported(text)
            else:
                self.add(_instruction(text, resolve, scope), name, scope[:1])
        self.calls.pop()
        self.labels[scope, f"{name}:end"] = len(self.instructions)
        for variable, result in zip(outputs, results, strict=True):
            self.copy(result.name, Symbol(variable.name))  # type: ignore[union-attr]
        return inputs, outputs

    def add(self, instruction: Instruction, function: str, outermost: tuple[int, ...]) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode[0] == "call":
            groups = [o for o in operands if isinstance(o, Group)]
            callee = next(o for o in operands if isinstance(o, Symbol))
            before = operands.index(callee)
            results = groups[0].items if before else ()
            arguments = groups[before].items if len(groups) > before else ()
            if instruction.guard:
                raise Unsupported(instruction.text)
            self.body(callee.name, results, arguments)
        elif opcode[0] == "ret" and len(self.calls) > 1:
            end = (Symbol(f"{function}:end"),)
            self.instructions.append(
                dataclasses.replace(instruction, opcode=("bra",), operands=end, scope=outermost)
            )
        else:
            self.instructions.append(instruction)

    def copy(self, target: str, source: Operand) -> None:
        text = f"parameter {target}"
        self.instructions.append(
            Instruction(text, None, ("param", "copy"), (Symbol(target), source))
        )

    def declare(self, text: str, unique: Callable[[str], str]) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if not match:
            raise PtxError(f"not understood: {text}")
        for item in match[2].split(","):
            name, _, count = item.strip().rstrip(">").partition("<")
            for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                self.registers[unique(each)] = match[1]


def _statements(body: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(body):
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            yield body[at], ""
            at += 1
        elif label := _LABEL.match(body, at):
            yield "label", label[1]
            at = label.end()
        else:
            end = body.find(";", at)
            if end < 0:
                raise PtxError(f"does not end: {body[at : at + 60]}")
            yield "statement", body[at:end].strip()
            at = end + 1


_Resolve = Callable[[str], Register | Symbol]


def _instruction(text: str, resolve: _Resolve, scope: tuple[int, ...]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)\s*(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if not match:
        raise PtxError(f"not understood: {text}")
    guard: Register | Not | None = None
    if match[2]:
        register = _register(match[2], resolve)
        guard = Not(register) if match[1] else register
    operands = tuple(_operand(part, resolve) for part in _split(match[4]))
    return Instruction(" ".join(text.split()), guard, tuple(match[3].split(".")), operands, scope)


def _register(name: str, resolve: _Resolve) -> Register:
    register = resolve(name)
    if not isinstance(register, Register):
        raise PtxError(f"{name} is not a register")
    return register


def _operand(text: str, resolve: _Resolve) -> Operand:
    text = text.strip()
    if text[0] in "{(":
        return Group(tuple(_operand(part, resolve) for part in _split(text[1:-1])))
    if text[0] == "[":
        base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
        inner = _operand(base, resolve)
        if not isinstance(inner, Register | Symbol | Number):
            raise PtxError(f"not an address: {text}")
        return Address(inner, int(offset, 0) if offset else 0)
    if text[0] == "!":
        return Not(_register(text[1:].strip(), resolve))
    if "|" in text:
        return Group(tuple(_operand(part, resolve) for part in text.split("|")))
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        return Number(int(match[1], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Number(int(text.rstrip("U"), 0))
    name, _, offset = text.partition("+")
    if not _NAME.fullmatch(name.strip()):
        raise Unsupported(f"operand {text}")
    operand = resolve(name.strip())
    if isinstance(operand, Symbol) and offset:
        return Symbol(operand.name, int(offset, 0))
    return operand
