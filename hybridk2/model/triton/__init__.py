"""The GPU's kernels, in Triton. Importing this package loads nothing: its modules load Triton, so
only what computes on a CUDA device imports them."""
