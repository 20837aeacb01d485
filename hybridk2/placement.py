"""Placements: which routed experts live on the GPU; all others live in host memory.

Owns the placement as data, its file, and the policies that make one from how often each expert was
picked. Pure: knows no model, no machine and no traces. What a placement is worth, the tuner says.

A file is JSON: {"format", "version", "sha256" of the canonical placement, "placement": {"model",
"experts", "policy", "resident": one list of expert ids per MoE layer}}.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridk2.durable_file import flush_folder, replace_file
from hybridk2.errors import TuningError

FORMAT = "hybridk2 placement"
VERSION = 1

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Placement:
    """Experts on the GPU. model: the routing fingerprint. experts: in each layer. policy: what
    chose them. resident: for each MoE layer the ids, ascending."""

    model: str
    experts: int
    policy: str
    resident: tuple[tuple[int, ...], ...]

    @classmethod
    def from_mask(cls, model: str, policy: str, mask: Mask) -> Placement:
        """mask: (layers, experts), True where the expert lives on the GPU."""
        resident = tuple(tuple(np.flatnonzero(row).tolist()) for row in mask)
        return cls(model, mask.shape[1], policy, resident)

    @property
    def num_resident(self) -> int:
        return sum(map(len, self.resident))

    def mask(self) -> Mask:
        """(layers, experts), True where the expert lives on the GPU."""
        mask = np.zeros((len(self.resident), self.experts), bool)
        for layer, ids in enumerate(self.resident):
            mask[layer, list(ids)] = True
        return mask

    def check_model(self, path: Path, model: str, layers: int, experts: int) -> None:
        """Raises TuningError, naming the file it came from, if it was made for another model than
        the one with this routing fingerprint and so many MoE layers of so many experts."""
        found = (len(self.resident), self.experts)
        if found != (layers, experts):
            what = (
                f"{found[0]} layers of {found[1]} experts, and this model has {layers} of {experts}"
            )
        elif self.model != model:
            what = f"a model that routes by {self.model[:12]}, and this one by {model[:12]}"
        else:
            return
        raise TuningError(
            f"{path}: this placement was made for {what}. `hybridk2 tune` makes one for this model"
        )

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises TuningError when the disk refuses."""
        content = asdict(self)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "sha256": _checksum(content),
            "placement": content,
        }
        try:
            replace_file(path, (json.dumps(document) + "\n").encode("ascii"))
            flush_folder(path.absolute().parent)
        except OSError as error:
            raise TuningError(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Read a file. Raises TuningError when it cannot be read or is damaged."""
        try:
            document = json.loads(path.read_bytes())
        except OSError as error:
            raise TuningError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise TuningError(f"{path}: damaged: not valid JSON ({error})") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise TuningError(f"{path}: not a placement of HybridK2")
        if document.get("version") != VERSION:
            raise TuningError(
                f"{path}: placement version {document.get('version')!r}; this program reads "
                f"{VERSION}"
            )
        content = document.get("placement")
        if document.get("sha256") != _checksum(content):
            raise TuningError(f"{path}: damaged: its content does not match its checksum")
        if not isinstance(content, dict) or not _well_formed(content):
            raise TuningError(f"{path}: damaged: not lists of expert ids for each layer")
        resident = tuple(tuple(ids) for ids in content["resident"])
        return cls(content["model"], content["experts"], content["policy"], resident)


def _checksum(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _well_formed(content: dict[str, Any]) -> bool:
    """A checksum proves that the bytes are those written, not that a placement was."""
    if set(content) != set(Placement.__dataclass_fields__):
        return False
    experts, resident = content["experts"], content["resident"]
    return (
        isinstance(content["model"], str)
        and isinstance(content["policy"], str)
        and type(experts) is int
        and isinstance(resident, list)
        and all(isinstance(ids, list) and _ascending(ids, experts) for ids in resident)
    )


def _ascending(ids: list[Any], experts: int) -> bool:
    return all(type(expert) is int and 0 <= expert < experts for expert in ids) and all(
        first < second for first, second in pairwise(ids)
    )


def layer_budgets(layers: int, experts: int, budget: int) -> NDArray[np.int64]:
    """The same number of experts for each layer, the first layers taking what is left over."""
    budget = min(budget, layers * experts)
    return np.full(layers, budget // layers) + (np.arange(layers) < budget % layers)


def uniform(layers: int, experts: int, budget: int) -> Mask:
    """What one does who knows nothing: as many experts in each layer, ids spread evenly."""
    mask = np.zeros((layers, experts), bool)
    for layer, size in enumerate(layer_budgets(layers, experts, budget)):
        mask[layer, np.arange(size) * experts // max(size, 1)] = True
    return mask


def by_frequency(counts: NDArray[np.int64], budget: int) -> Mask:
    """As many experts in each layer, the most picked ones. counts: (layers, experts)."""
    layers, experts = counts.shape
    order = np.argsort(-counts, axis=1, kind="stable")
    mask = np.zeros(counts.shape, bool)
    for layer, size in enumerate(layer_budgets(layers, experts, budget)):
        mask[layer, order[layer, :size]] = True
    return mask


def by_marginal_gain(gains: NDArray[Any], budget: int) -> Mask:
    """The experts of the largest gains, whatever their layers: each layer gets the budget that
    pays there. gains: (layers, experts), counts for one; experts of a negative one stay out.

    All experts are equally large. Where the gain of one does not depend on the others, as with
    counts, taking the largest gains is the optimum, not an approximation of it.
    """
    mask = np.zeros(gains.size, bool)
    mask[np.argsort(-gains, axis=None, kind="stable")[:budget]] = True
    return mask.reshape(gains.shape) & (gains >= 0)
