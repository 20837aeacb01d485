"""How fast this machine is: layers as the engine computes them, nodes of memory, a card, a disk."""

from hybridk2.measurement.card import CardFigures, measure_card
from hybridk2.measurement.layers import arithmetic_roofs, measure_machine
from hybridk2.measurement.storage import disk_bytes_per_second, node_read_roofs

__all__ = [
    "CardFigures",
    "arithmetic_roofs",
    "disk_bytes_per_second",
    "measure_card",
    "measure_machine",
    "node_read_roofs",
]
