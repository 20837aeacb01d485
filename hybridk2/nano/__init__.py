"""K2-nano, the embedded model: its corpus, its training, its checkpoint.

A leaf beside the command line: nothing of HybridK2 imports it; the checkpoint is found by name.
"""
