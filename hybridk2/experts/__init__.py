"""Routed experts: where they are kept, how they get there, and when the device hands over."""
