"""The part of PTX that the mailbox's kernels are written in, executed on bytes.

Follows NVIDIA's PTX ISA for each instruction and knows no others. Threads of the one block run one
after the other from barrier to barrier; whoever shares memory with them acts in `on_spin`, when a
thread asks for the time.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_SIZES = {"u32": 4, "b32": 4, "u64": 8, "b64": 8}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "ne": lambda a, b: a != b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rem": lambda a, b: a % b,
    "shl": lambda a, b: a << b,
}


class Memory:
    """Global memory: ranges of bytes at addresses, each access within one and aligned."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, bytearray]] = []

    def add(self, address: int, size: int) -> bytearray:
        self._ranges.append((address, bytearray(size)))
        return self._ranges[-1][1]

    def _find(self, address: int, size: int) -> tuple[bytearray, int]:
        assert address % size == 0, f"{size} bytes at {address:#x} are not aligned"
        for begin, data in self._ranges:
            if begin <= address and address + size <= begin + len(data):
                return data, address - begin
        raise AssertionError(f"{size} bytes at {address:#x} belong to nobody")

    def read(self, address: int, size: int) -> bytes:
        data, at = self._find(address, size)
        return bytes(data[at : at + size])

    def write(self, address: int, value: bytes) -> None:
        data, at = self._find(address, len(value))
        data[at : at + len(value)] = value


@dataclass(frozen=True)
class Kernel:
    """An entry: its instructions, where its labels are, its registers' sizes in bytes."""

    parameter_bytes: int
    instructions: list[tuple[str, str, list[str]]]  # predicate or "", opcode, operands
    labels: dict[str, int]
    registers: dict[str, int]
    shared: set[str]


def parse(ptx: str) -> dict[str, Kernel]:
    """Every entry of a module."""
    ptx = re.sub(r"//.*", "", ptx)
    kernels = {}
    entry = r"\.visible \.entry (\w+)\(\.param \.align 8 \.b8 arguments\[(\d+)\]\)\s*\{(.*?)\n\}"
    for name, size, body in re.findall(entry, ptx, re.S):
        kernel = Kernel(int(size), [], {}, {}, set())
        for statement in re.findall(r"(\w+):|([^;:]+);", body):
            _read_statement(kernel, statement[0], " ".join(statement[1].split()))
        kernels[name] = kernel
    return kernels


def _read_statement(kernel: Kernel, label: str, text: str) -> None:
    if label:
        kernel.labels[label] = len(kernel.instructions)
    elif text.startswith(".reg"):
        _, kind, names = text.split(" ", 2)
        size = 1 if kind == ".pred" else _SIZES[kind[1:]]
        for name in names.split(", "):
            assert name not in kernel.registers, name
            kernel.registers[name] = size
    elif text.startswith(".shared"):
        kernel.shared.add(text.split()[-1])
    else:
        match = re.fullmatch(r"(?:@(\w+) )?([\w.]+) ?(.*)", text)
        assert match, text
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[%\w.]+", match[3])
        kernel.instructions.append((match[1] or "", match[2], operands))


@dataclass
class Block:
    """One block of threads that runs a kernel.

    on_spin: called with the time so far, in nanoseconds, when a thread asks for it; each time takes
    a microsecond. orders: the memory orders that were named, with the address and the thread.
    stores: addresses in global memory, as they were written.
    """

    memory: Memory
    threads: int
    on_spin: Callable[[int], None] = lambda nanoseconds: None
    nanoseconds: int = 0
    orders: list[tuple[str, int, int]] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)

    def run(self, kernel: Kernel, arguments: bytes) -> None:
        """To the end of every thread. All threads meet at a barrier, or have ended."""
        assert len(arguments) == kernel.parameter_bytes
        shared: dict[str, int] = {}
        running = [
            self._thread(kernel, arguments, shared, thread) for thread in range(self.threads)
        ]
        while running:
            at_barrier = [thread for thread in running if next(thread, None) is not None]
            assert len(at_barrier) in (0, len(running)), "some threads ended, some wait for them"
            running = at_barrier

    def _thread(
        self, kernel: Kernel, arguments: bytes, shared: dict[str, int], thread: int
    ) -> Iterator[str]:
        registers: dict[str, int] = {}
        special = {"%tid.x": thread, "%ntid.x": self.threads}

        def value(operand: str) -> int:
            if operand == "%globaltimer":
                self.nanoseconds += 1000
                assert self.nanoseconds < 1_000_000, "a thread waits for ever"
                self.on_spin(self.nanoseconds)
                return self.nanoseconds
            if operand in special:
                return special[operand]
            return registers[operand] if operand in kernel.registers else int(operand)

        def put(register: str, number: int) -> None:
            registers[register] = number & ((1 << 8 * kernel.registers[register]) - 1)

        def address(operand: str) -> int:
            name, _, offset = operand.strip("[]").partition("+")
            return registers[name] + int(offset or 0)

        at = 0
        while True:
            predicate, opcode, operands = kernel.instructions[at]
            at += 1
            if predicate and not registers[predicate]:
                continue
            name, *parts = opcode.split(".")
            kind = parts[-1] if parts else ""
            if name == "ret":
                return
            if name == "bra":
                at = kernel.labels[operands[0]]
            elif name == "bar":
                yield "barrier"
            elif name == "setp":
                numbers = [value(operand) for operand in operands[1:3]]
                if kind == "s64":
                    numbers = [number - (number >> 63 << 64) for number in numbers]
                holds = _COMPARISONS[parts[0]](*numbers)
                if parts[1] == "and":
                    holds = holds and bool(registers[operands[3]])
                put(operands[0], holds)
            elif name in ("mov", "cvt", "cvta"):
                put(operands[0], value(operands[1]))
            elif name in _ARITHMETIC:
                put(operands[0], _ARITHMETIC[name](value(operands[1]), value(operands[2])))
            elif name == "mad":
                product = value(operands[1]) * value(operands[2])
                put(operands[0], product + value(operands[3]))
            elif name in ("ld", "st"):
                target, where = operands if name == "ld" else reversed(operands)
                move = self._load if name == "ld" else self._store
                names = target.strip("{}").split(", ")
                size = _SIZES[kind]
                for register in names:
                    assert kernel.registers[register] == size, f"{opcode} {operands}"
                if parts[0] == "param":
                    offset = int(where.strip("[]").partition("+")[2] or 0)
                    data = arguments[offset : offset + size]
                    put(names[0], int.from_bytes(data, "little"))
                elif parts[0] == "shared":
                    word = where.strip("[]")
                    assert word in kernel.shared
                    if name == "ld":
                        put(names[0], shared[word])
                    else:
                        shared[word] = registers[names[0]]
                else:
                    if parts[0] != "global":
                        assert parts[1:3] == ["sys", "global"], opcode
                        self.orders.append((f"{name}.{parts[0]}", address(where), thread))
                    move(address(where), size, names, registers, put)
            else:
                assert name == "nanosleep", opcode

    def _load(
        self, address: int, size: int, names: list[str], _: Any, put: Callable[[str, int], None]
    ) -> None:
        data = self.memory.read(address, size * len(names))
        for position, name in enumerate(names):
            part = data[position * size : (position + 1) * size]
            put(name, int.from_bytes(part, "little"))

    def _store(
        self, address: int, size: int, names: list[str], registers: dict[str, int], _: Any
    ) -> None:
        self.stores.append(address)
        parts = [registers[name].to_bytes(size, "little") for name in names]
        self.memory.write(address, b"".join(parts))


def packed(layout: str, *values: int) -> bytes:
    """A kernel's arguments, as C lays them out: padded to eight bytes."""
    data = struct.pack("<" + layout, *values)
    return data + bytes(-len(data) % 8)
