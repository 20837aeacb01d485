"""From a checkpoint's dense weights to a model that computes.

Owns the order of reading and what the dense part needs of the machine. The routed experts are
loaded elsewhere; the model is put together around them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridk2.checkpoint import Checkpoint, LoadProgress
from hybridk2.config import K2Config
from hybridk2.cuda_driver import CudaDriver
from hybridk2.device import Device
from hybridk2.errors import DriverError
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import ThreadRouter
from hybridk2.kv_cache import LatentFormat
from hybridk2.model.attention import PagedMix
from hybridk2.model.k2 import DecoderLayer, K2Model
from hybridk2.model.moe import RoutedExperts
from hybridk2.model.triton import latents

if TYPE_CHECKING:
    from hybridk2.model.hopper.attention import HopperAttention

logger = logging.getLogger(__name__)

# Dense bytes per layer from which more than one thread shares an operator.
_SHARED_LAYER_BYTES = 4 << 20


def dense_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Memory of all weights but the routed experts; embedding and head stay as they are stored."""
    config = checkpoint.config
    kept_bytes = 2 * config.vocab_size * config.hidden_size * torch.bfloat16.itemsize
    widening = dtype.itemsize / torch.bfloat16.itemsize
    return kept_bytes + int((checkpoint.dense_bytes - kept_bytes) * widening)


def dense_threads(checkpoint: Checkpoint, threads: int) -> int:
    """Threads for dense arithmetic: one where an operator is too small to be shared out.

    torch's threads spin at a barrier after every operator. On a layer of a few hundred kilobytes
    they gain nothing, and beside other programs each barrier waits for the scheduler: the embedded
    model then made 2 tokens/s with two threads and 100 with one (2 Zen 4 cores, both busy).
    """
    layer_bytes = checkpoint.dense_bytes / checkpoint.config.num_hidden_layers
    return threads if layer_bytes >= _SHARED_LAYER_BYTES else 1


def paged_mix_for(config: K2Config, device: Device) -> PagedMix | None:
    """The kernel that attends over pages, on a device that has kernels."""
    if not device.has_kernels:
        return None
    from hybridk2.model.triton import mla  # loads Triton

    hopper = _hopper_attention(config, device)

    def mix(q: Tensor, pages: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
        if hopper is not None and hopper.takes(q, pages):
            return hopper.decode(q, pages, page_table, lengths)
        rows, heads, _ = q.shape
        tiling = mla.tiling_for(q.dtype, pages.dtype, heads, device.program_bytes)
        return mla.decode(
            q,
            pages,
            page_table,
            lengths,
            scale=config.softmax_scale,
            rank=config.kv_lora_rank,
            splits=mla.splits_for(rows, heads, device.multiprocessors, tiling),
            tiling=tiling,
        )

    return mix


def _hopper_attention(config: K2Config, device: Device) -> HopperAttention | None:
    """What is faster than Triton's kernel where it can be had."""
    from hybridk2.model.hopper import attention

    if not attention.suits(config, device):
        return None
    try:
        made = attention.HopperAttention(CudaDriver.load(), device, config.softmax_scale)
    except DriverError as error:
        logger.warning("attention of decoding by Triton's kernel, which is slower: %s", error)
        return None
    logger.info("attention of decoding over bf16 latents: the kernel for Hopper cards")
    return made


def fp8_latents(config: K2Config) -> LatentFormat:
    """The latent cache in fp8, which the same kernel reads: 656 bytes a token and layer of K2."""
    rank = config.kv_lora_rank
    return LatentFormat(
        torch.uint8,
        latents.token_bytes(rank, config.qk_rope_head_dim),
        partial(latents.quantise_latents, rank=rank),
        partial(latents.dequantise_latents, rank=rank),
    )


def load_model(
    checkpoint: Checkpoint,
    experts: HostExperts,
    device: Device,
    dtype: torch.dtype,
    on_progress: Callable[[LoadProgress], None] | None = None,
    *,
    routed: RoutedExperts | None = None,
    paged_mix: PagedMix | None = None,
    int8: bool = False,
) -> K2Model:
    """Read the dense weights layer by layer and put the model together around loaded experts.

    routed: over these experts; None for what suits every device. paged_mix: see LatentAttention.
    int8: the form of matrices but routers', kv_b's and the embedding.

    Raises CheckpointError with the name of a tensor that cannot be read.
    """
    config = checkpoint.config
    routed = routed or RoutedExperts(ThreadRouter(experts, device))
    started = time.perf_counter()
    layer_bytes = checkpoint.dense_bytes // (config.num_hidden_layers + 1)

    def report(done: int) -> None:
        if on_progress is not None:
            seconds = time.perf_counter() - started
            on_progress(LoadProgress("dense weights", done, checkpoint.dense_bytes, seconds))

    layers = []
    for index in range(config.num_hidden_layers):
        weights = checkpoint.layer(index)
        layers.append(DecoderLayer(config, weights, index, routed, device, dtype, paged_mix, int8))
        report((index + 1) * layer_bytes)
    model = K2Model(
        config,
        checkpoint.embedding(),
        layers,
        checkpoint.final_norm(),
        checkpoint.lm_head(),
        device,
        dtype,
        routed,
        int8,
    )
    report(checkpoint.dense_bytes)
    return model
