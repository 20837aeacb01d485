"""Published Kimi K2 checkpoints as named, checked tensors in host memory.

`locate_model` finds the folder, `Checkpoint.open` refuses whatever is incomplete, damaged or of
another model over the headers alone, and reading hands out plain torch tensors. It does not know
what is computed with them or where they live afterwards.
"""

from hybridk2.checkpoint.description import FolderDescription, describe_folder
from hybridk2.checkpoint.fingerprint import routing_fingerprint
from hybridk2.checkpoint.layout import Layout, QuantizedSpec, Role, TensorSpec
from hybridk2.checkpoint.location import download_model, locate_model
from hybridk2.checkpoint.progress import LoadProgress
from hybridk2.checkpoint.reader import Checkpoint, ExpertReader
from hybridk2.checkpoint.weights import (
    AttentionWeights,
    ExpertWeights,
    LayerWeights,
    MlpWeights,
    QuantizedLinear,
    RouterWeights,
)

__all__ = [
    "AttentionWeights",
    "Checkpoint",
    "ExpertReader",
    "ExpertWeights",
    "FolderDescription",
    "LayerWeights",
    "Layout",
    "LoadProgress",
    "MlpWeights",
    "QuantizedLinear",
    "QuantizedSpec",
    "Role",
    "RouterWeights",
    "TensorSpec",
    "describe_folder",
    "download_model",
    "locate_model",
    "routing_fingerprint",
]
