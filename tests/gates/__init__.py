"""The release gates: what a server must keep to before it is let go, run by `make gates`.

Each gate drives real `hybridk2 serve` processes over real sockets, compares what it measured with
the gate's limit, and prints one line of figures. They take minutes and their limits are of time and
memory, so they are no part of `make test`.
"""
