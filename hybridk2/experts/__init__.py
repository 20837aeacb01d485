"""Routed experts: where they are kept, how they get there, and the crossing from the device to them."""
