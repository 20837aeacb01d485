"""The HTTP server: one engine behind the APIs that chat front ends, agents and libraries speak.

Nothing here imports torch when it is imported, so that the server answers /health while the model
is still being loaded.
"""
