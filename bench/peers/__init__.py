"""Other engines on the bench: each in its own virtual environment, driven as a process over a pipe.

`client` is the bench's side, `protocol` what both sides share, `*_worker` one engine each. Workers
see numpy and their engine, never HybridK2; the bench sees no engine but its own.
"""
