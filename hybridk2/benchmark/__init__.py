"""A loaded engine, measured: how fast it reads and decodes at several contexts, and why."""
