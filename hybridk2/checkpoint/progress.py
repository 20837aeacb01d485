"""How far a transfer of weights is: download, load or synthesis. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadProgress:
    """A moment in a transfer of `total_bytes`, `seconds` after its start.

    stage: what is going on, in words for a person.
    """

    stage: str
    done_bytes: int
    total_bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """Mean rate so far, in 1e9 bytes per second; 0 before any time has passed."""
        return self.done_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the mean rate, or None while there is no rate yet."""
        if not self.done_bytes or self.seconds <= 0:
            return None
        return (self.total_bytes - self.done_bytes) / self.done_bytes * self.seconds
