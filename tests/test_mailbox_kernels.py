"""The mailbox's PTX: assembled for every card that we name, and executed instruction by
instruction against what csrc/mailbox_kernels.h promises."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import triton

from hybridk2 import _native

from .ptx_interpreter import Block, Memory, packed, parse
from .triton_offline import CARDS

KERNELS = parse(_native.MAILBOX_PTX)

# Addresses that nothing else has; a slot: 256 bytes of words, then picks, weights, x, result.
SLOTS, STATE, REPORT, X, IDS, WEIGHTS, OUT = (0x1000_0000 * n for n in range(1, 8))
RING, SLOT_BYTES = 4, 4096
WHOLE = 2048  # of a result: four reads for each of 32 threads
IDS_AT, WEIGHTS_AT, X_AT, RESULT_AT = 256, 384, 512, 2048
FAILED, TIMED_OUT, WRONG_LAYER, OVERWRITTEN, NOT_PUBLISHED, RING_FULL = range(1, 7)


@dataclass
class Card:
    """Memory as a handoff lays it out, and the three kernels."""

    threads: int = 32
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.slots = self.memory.add(SLOTS, RING * SLOT_BYTES)
        self.state = self.memory.add(STATE, 24)
        self.report = self.memory.add(REPORT, 16)
        self.x = self.memory.add(X, 1024)
        self.ids = self.memory.add(IDS, 96)
        self.weights = self.memory.add(WEIGHTS, 96)
        self.out = self.memory.add(OUT, WHOLE)
        for data in (self.slots, self.x, self.ids, self.weights, self.out):
            data[:] = random.Random(len(data)).randbytes(len(data))
        for slot in range(RING):
            self.answer(slot, 0, 0, 0)
            self.slots[slot * SLOT_BYTES : slot * SLOT_BYTES + 16] = bytes(16)
        self.begin(1)

    def begin(self, number: int) -> None:
        Block(self.memory, 1).run(KERNELS["hybridk2_begin"], packed("QQ", STATE, number))
        self.report[:] = bytes(16)

    def publish(self, layer: int, x_bytes: int, pick_bytes: int, tokens: int) -> Block:
        block = Block(self.memory, self.threads)
        arguments = packed(
            "8Q7I",
            *(SLOTS, STATE, REPORT, X, IDS, WEIGHTS, SLOT_BYTES, RING),
            *(X_AT, x_bytes, IDS_AT, WEIGHTS_AT, pick_bytes, layer, tokens),
        )
        block.run(KERNELS["hybridk2_publish"], arguments)
        return block

    def await_answer(self, layer: int, result_bytes: int, block: Block | None = None) -> Block:
        block = block or Block(self.memory, self.threads)
        arguments = packed(
            "7Q3I",
            *(SLOTS, STATE, REPORT, OUT, SLOT_BYTES, RING, 50_000),
            *(RESULT_AT, result_bytes, layer),
        )
        block.run(KERNELS["hybridk2_await"], arguments)
        return block

    def answer(self, slot: int, number: int, layer: int, code: int) -> None:
        at = slot * SLOT_BYTES + 128
        self.slots[at : at + 16] = packed("QII", number, layer, code)

    def numbers(self) -> tuple[int, int, int]:
        """To publish, to await, and whether the step has failed."""
        return (*(int.from_bytes(self.state[at : at + 8], "little") for at in (0, 8, 16)),)  # type: ignore[return-value]

    def failure(self) -> tuple[int, int, int]:
        """Number, code, layer."""
        fields = (self.report[:8], self.report[8:12], self.report[12:])
        return (*(int.from_bytes(data, "little") for data in fields),)  # type: ignore[return-value]


@pytest.mark.parametrize("card", CARDS)
def test_the_kernels_assemble_for_every_card(tmp_path: Path, card: int) -> None:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = folder / ("ptxas-blackwell" if card >= 100 else "ptxas")
    source = tmp_path / "mailbox.ptx"
    source.write_text(_native.MAILBOX_PTX)
    command = [assembler, f"-arch=sm_{card}", "-v", source, "-o", tmp_path / "mailbox.cubin"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert said.count("0 bytes spill stores") == len(KERNELS)


@pytest.mark.parametrize("threads", [1, 3, 32, 96])
@pytest.mark.parametrize(("tokens", "x_bytes", "pick_bytes"), [(1, 128, 12), (8, 1024, 96)])
def test_tokens_are_published_whole(
    threads: int, tokens: int, x_bytes: int, pick_bytes: int
) -> None:
    card = Card(threads)
    card.begin(6)  # slot 2
    before = bytes(card.slots)
    block = card.publish(9, x_bytes, pick_bytes, tokens)
    expected = bytearray(before)
    slot = 2 * SLOT_BYTES
    expected[slot : slot + 16] = packed("QII", 6, 9, tokens)
    for at, data, size in (
        (X_AT, card.x, x_bytes),
        (IDS_AT, card.ids, pick_bytes),
        (WEIGHTS_AT, card.weights, pick_bytes),
    ):
        expected[slot + at : slot + at + size] = data[:size]
    assert card.slots == expected
    assert card.numbers() == (7, 6, 0)
    assert block.orders == [("st.release", SLOTS + slot, 0)]
    assert block.stores[-2:] == [SLOTS + slot, STATE]  # behind every thread's


@pytest.mark.parametrize("threads", [1, 3, 32, 96])
@pytest.mark.parametrize("result_bytes", [128, 1152, WHOLE])
def test_an_answer_is_waited_for_and_copied_whole(threads: int, result_bytes: int) -> None:
    card = Card(threads)
    card.begin(3)
    card.publish(5, 128, 12, 1)
    before = bytes(card.out)
    result = slice(3 * SLOT_BYTES + RESULT_AT, 3 * SLOT_BYTES + RESULT_AT + result_bytes)

    def host(nanoseconds: int) -> None:
        if nanoseconds == 20_000:
            card.slots[result] = random.Random(1).randbytes(result_bytes)
            card.answer(3, 3, 5, 0)

    block = card.await_answer(5, result_bytes, Block(card.memory, threads, host))
    assert block.nanoseconds == 20_000
    assert card.out == card.slots[result] + before[result_bytes:]
    assert card.numbers() == (4, 4, 0)
    acquired = [at for order, at, thread in block.orders if order == "ld.acquire"]
    assert set(acquired) == {SLOTS + 3 * SLOT_BYTES + 128}
    # Every read of the answer names the system's scope and comes behind the last acquire.
    assert {order for order, *_ in block.orders} == {"ld.acquire", "ld.relaxed"}


def assert_failed(card: Card, number: int, code: int, layer: int) -> None:
    assert card.failure() == (number, code, layer)
    assert card.numbers()[2] == code
    assert not any(card.out)


def test_no_answer_in_time_is_reported_and_the_next_await_does_not_wait() -> None:
    card = Card()
    card.publish(1, 128, 12, 1)
    card.publish(2, 128, 12, 1)
    block = card.await_answer(1, WHOLE)
    assert 50_000 <= block.nanoseconds < 53_000
    assert_failed(card, 1, TIMED_OUT, 1)
    card.out[:] = b"x" * len(card.out)
    block = card.await_answer(2, WHOLE)
    assert block.nanoseconds == 0
    assert_failed(card, 1, TIMED_OUT, 1)  # the first is what is told
    before = bytes(card.slots)
    card.publish(3, 128, 12, 1)
    assert card.slots == before
    card.begin(9)
    card.publish(3, 128, 12, 1)
    assert card.numbers() == (10, 9, 0)


@pytest.mark.parametrize(
    ("answered", "layer", "code", "reported"),
    [(1, 1, FAILED, FAILED), (1, 4, 0, WRONG_LAYER), (5, 1, 0, OVERWRITTEN)],
)
def test_an_answer_that_is_none_is_reported(
    answered: int, layer: int, code: int, reported: int
) -> None:
    card = Card()
    card.publish(1, 128, 12, 1)
    card.answer(1, answered, layer, code)
    card.await_answer(1, WHOLE)
    assert_failed(card, 1, reported, 1)


def test_what_was_not_published_is_not_waited_for() -> None:
    card = Card()
    assert card.await_answer(1, WHOLE).nanoseconds == 0
    assert_failed(card, 1, NOT_PUBLISHED, 1)


def test_a_slot_is_not_published_again_before_it_was_awaited() -> None:
    card = Card()
    for layer in range(RING):
        card.publish(layer, 128, 12, 1)
    before = bytes(card.slots)
    card.publish(7, 128, 12, 1)
    assert card.slots == before
    assert card.failure() == (1 + RING, RING_FULL, 7)
    card.begin(1 + RING)
    card.publish(0, 128, 12, 1)
    card.answer((1 + RING) % RING, 1 + RING, 0, 0)
    card.await_answer(0, WHOLE)
    assert card.numbers() == (2 + RING, 2 + RING, 0)
