"""Attention of decoding on Hopper cards: what mla.decode does, in one launch of a kernel in PTX.

Owns how attention.cu is launched, which holds the kernel, its bounds and its roundings; `make ptx`
compiles it to attention.ptx. Constants are the kernel's, by its names.
"""

from __future__ import annotations

import ctypes
from importlib import resources

import torch
from torch import Tensor

from hybridk2.config import K2Config
from hybridk2.cuda_driver import CudaDriver, Launch
from hybridk2.device import Device
from hybridk2.model.triton import mla

CAPABILITY = (9, 0)
HEADS, RANK, DIM = 64, 512, 576
KEYS = 32  # of a tile
THREADS = 384
MOST_SHARES = 132
SHARED_BYTES = 230_248
CLUSTER = 1  # programs that share what they have in shared memory
# Each number of rows has counters of its own: a launch finds those of its kind where the one before
# left them. 36 are 1 + 2 + ... + 8.
MOST_ROWS = 8
_COUNTERS = MOST_ROWS * (MOST_ROWS + 1) // 2


class Arguments(ctypes.Structure):
    """attention.cu's, which says what they are."""

    _fields_ = (
        ("page_table", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("shares", ctypes.c_int),
    )


def suits(config: K2Config, device: Device) -> bool:
    """Whether the kernel is made for this model and this card."""
    dimensions = config.num_attention_heads, config.kv_lora_rank, config.latent_dim
    return device.capability == CAPABILITY and dimensions == (HEADS, RANK, DIM)


def shares_for(rows: int, multiprocessors: int) -> int:
    """Shares of a row's keys, a program each, all of which are on the card at the same time.

    Of rows and card alone: a row's bits depend on it, and so do the counters.
    """
    shares = min(multiprocessors // rows, MOST_SHARES)
    return shares - shares % CLUSTER


class HopperAttention:
    """The kernel on one card, for a model that it `suits`. Launches are made in one stream at a
    time: they share counters."""

    def __init__(self, driver: CudaDriver, device: Device, scale: float) -> None:
        """scale: of scores. Raises DriverError for a kernel that the driver does not load."""
        self._driver = driver
        self._device = device
        self._scale = scale * mla.LOG2_E
        # First of all, so that torch has made its context the thread's.
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int64, device=device.torch_device)
        ptx = resources.files(__package__).joinpath("attention.ptx").read_text()
        self._kernel = driver.kernel(ptx, "hybridk2_attention", SHARED_BYTES)

    def takes(self, q: Tensor, latents: Tensor) -> bool:
        """Whether these are of the types, and the rows no more, than the kernel is made for."""
        return q.dtype == latents.dtype == torch.bfloat16 and len(q) <= MOST_ROWS

    def decode(self, q: Tensor, latents: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
        """See mla.decode, of bf16 queries and latents that `takes` said yes to.

        A row's bits depend on its own queries and keys, and on how many rows there are. Beside the
        result 8.7 MB are taken, of K2 on 132 multiprocessors, whatever the rows.
        """
        mla.check_inputs(q, latents, page_table, lengths, RANK)
        _check(q, latents)
        rows = len(q)
        shares = shares_for(rows, self._device.multiprocessors)
        out = q.new_empty((rows, HEADS, RANK), dtype=torch.float32)
        means = q.new_empty((rows, shares, 2, HEADS, RANK // 2), dtype=torch.float16)
        stats = out.new_empty((rows, HEADS, shares, 2))
        arguments = Arguments(
            page_table.data_ptr(),
            lengths.data_ptr(),
            means.data_ptr(),
            stats.data_ptr(),
            self._counters.data_ptr(),
            out.data_ptr(),
            page_table.stride(0),
            self._scale,
            shares,
        )
        # A latent, or a query, is nine blocks of 64 columns, of which each has a line of 128 bytes
        # for a key, or a head: so they lie in shared memory.
        blocks, block_bytes = DIM // 64, 2 * 64
        latent_map = self._driver.tensor_map(
            latents.data_ptr(),
            sizes=(64, mla.PAGE_TOKENS, blocks, len(latents)),
            strides=(2 * DIM, block_bytes, 2 * latents.stride(0)),
            box=(64, KEYS, blocks, 1),
        )
        query_map = self._driver.tensor_map(
            q.data_ptr(),
            sizes=(64, HEADS, blocks, rows),
            strides=(2 * q.stride(1), block_bytes, 2 * q.stride(0)),
            box=(64, HEADS, blocks, 1),
        )
        launch = Launch((shares, rows), CLUSTER, THREADS, SHARED_BYTES, self._device.stream())
        self._driver.launch(self._kernel, launch, [latent_map, query_map, arguments])
        return out


def _check(q: Tensor, latents: Tensor) -> None:
    """Refuse what only this kernel would misread: the copy engine reads 16 bytes at a time."""
    assert q.shape[1:] == (HEADS, DIM), f"q: {tuple(q.shape)}"
    assert q.dtype == latents.dtype == torch.bfloat16, f"q: {q.dtype}, latents: {latents.dtype}"
    assert 0 < len(q) <= MOST_ROWS, f"{len(q)} rows"
    for name, tensor, strides in (
        ("q", q, q.stride()[:2]),
        ("latents", latents, latents.stride()[:1]),
    ):
        assert tensor.data_ptr() % 16 == 0, f"{name} at {tensor.data_ptr():#x}"
        assert all(stride % 8 == 0 for stride in strides), f"{name}: strides {tensor.stride()}"
