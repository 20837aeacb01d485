"""What a session found: one row a figure, with its target where the issue sets one."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hybridk2.device import Device

_LONG_ENOUGH = 0.02  # seconds
_MOST_TIMES = 1000


@dataclass(frozen=True)
class Row:
    """target: what is asked of the value, None for a figure alone. passed: None without one."""

    what: str
    value: float
    unit: str
    target: str | None = None
    passed: bool | None = None


class Table:
    """Rows as they are found, printed at once; what could not be seen is kept as well."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.unseen: list[str] = []

    def figure(self, what: str, value: float, unit: str) -> None:
        self._add(Row(what, value, unit))

    def at_most(self, what: str, value: float, unit: str, most: float) -> None:
        self._add(Row(what, value, unit, f"at most {most:.4g}", value <= most))

    def at_least(self, what: str, value: float, unit: str, least: float) -> None:
        self._add(Row(what, value, unit, f"at least {least:.4g}", value >= least))

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Run a part of the session. What it raises is a row that failed, not the session's end:
        the next part may still say something."""
        began = time.perf_counter()
        try:
            measure()
        except Exception as error:  # noqa: BLE001 - reported as a failed row
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
            self._add(Row(f"{what}: {found}", float("nan"), "", "no error", False))
        print(f"  ({what}: {time.perf_counter() - began:.1f} s)", flush=True)

    def not_seen(self, what: str) -> None:
        self.unseen.append(what)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.passed is False]

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "unseen": self.unseen}

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        verdict = {True: "pass", False: "FAIL", None: ""}[row.passed]
        target = f"({row.target})" if row.target else ""
        print(f"{verdict:5}{row.what:66} {row.value:11.4g} {row.unit:8}{target}", flush=True)


def median_seconds(device: Device, run: Callable[[], object], rounds: int = 10) -> float:
    """Of one run, waited for; behind two that compile and warm."""
    seconds = []
    for number in range(rounds + 2):
        device.wait()
        began = time.perf_counter()
        run()
        device.wait()
        if number >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def seconds_in_a_row(device: Device, run: Callable[[int], object], times: int = 20) -> float:
    """Of one run among several that the device does one after another, recorded where it can be,
    as steps are decoded: launching is hidden.

    run: takes its number among them. It may take other data each time, so that what it reads is in
    no cache. times: at least, and as many as last so long that waiting for them all, which may take
    0.1 ms, does not show.
    """
    seconds = _row(device, run, times)
    if times * seconds < _LONG_ENOUGH:
        times = min(math.ceil(_LONG_ENOUGH / seconds), _MOST_TIMES)
        seconds = _row(device, run, times)
    return seconds


def _row(device: Device, run: Callable[[int], object], times: int) -> float:
    def all_of_them() -> None:
        for number in range(times):
            run(number)

    all_of_them()
    device.wait()
    recorded = device.record(all_of_them) if device.replays_steps else all_of_them
    return median_seconds(device, recorded, rounds=5) / times
