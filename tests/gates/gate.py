"""What a gate is: a name, a check, and the figures and broken promises that the check found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.gates.fleet import Fleet

Check = Callable[["Fleet", "Outcome"], None]


@dataclass
class Outcome:
    """What one run of a gate found."""

    figures: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def say(self, figure: str) -> None:
        """Something measured, for the gate's line."""
        self.figures.append(figure)

    def hold(self, holds: Any, promise: str) -> None:
        """A promise of the gate, in words that say what is wrong where it does not hold."""
        if not holds and promise not in self.broken:
            self.broken.append(promise)

    @property
    def verdict(self) -> str:
        return "FAIL" if self.broken else "pass"


@dataclass(frozen=True)
class Gate:
    """One gate. name: its number in the list of gates, or a word."""

    name: str
    promise: str
    check: Check


def gate(name: str, promise: str) -> Callable[[Check], Gate]:
    """Makes a gate of the function that checks it."""
    return lambda check: Gate(name, promise, check)
