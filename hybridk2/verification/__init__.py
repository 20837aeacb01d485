"""Proof for a user that the engine computes the published model.

`checksums` compares files with a published list. `layers` feeds chosen decoder layers with the
same hidden states through the engine and through transformers' DeepseekV3, part by part;
`published` is transformers' side and reads the checkpoint itself, `engine_side` is ours,
`comparison` decides what is close enough and why. Nothing here is used when the engine serves.
"""
