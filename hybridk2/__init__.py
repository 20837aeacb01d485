"""HybridK2: Kimi-K2-Thinking on one workstation."""

__version__ = "0.1.0"
