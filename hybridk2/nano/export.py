"""The trained network as a checkpoint folder in K2's published format, and back.

Owns the packing of codes into int32 words and the files' names. Tensor names and shapes come from
`hybridk2.checkpoint.Layout`.
"""

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hybridk2.checkpoint import Checkpoint, Layout, QuantizedLinear, QuantizedSpec
from hybridk2.config import GROUP_SIZE
from hybridk2.errors import CheckpointError
from hybridk2.nano.network import Layer, MixtureOfExperts, Network, SwiGlu, quantize


def pack(codes: Tensor) -> Tensor:
    """Codes (out, groups, 32) in -8..7 to int32 (out, in / 8), lowest nibble = lowest column."""
    nibbles = (codes.flatten(1).to(torch.int64) + 8).unflatten(1, (-1, 8))
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _quantized(spec: QuantizedSpec, weight: Tensor) -> dict[str, Tensor]:
    codes, scales = quantize(weight.detach().float().cpu())
    return {
        spec.packed.name: pack(codes),
        spec.scale.name: scales[..., 0].bfloat16(),
        spec.weight_shape.name: torch.tensor(weight.shape, dtype=torch.int32),
    }


def _bf16(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().cpu().bfloat16().contiguous()


def _swiglu(specs: dict[str, str], block: SwiGlu) -> dict[str, Tensor]:
    return {name: _bf16(getattr(block, field)) for field, name in specs.items()}


def _layer_tensors(layout: Layout, index: int, layer: Layer) -> dict[str, Tensor]:
    tensors = {
        spec.name: _bf16(getattr(layer, field)) for field, spec in layout.norms(index).items()
    }
    for field, spec in layout.attention(index).items():
        tensors[spec.name] = _bf16(getattr(layer.attention, field))
    block = layer.mlp
    if isinstance(block, SwiGlu):
        names = {field: spec.name for field, spec in layout.dense_mlp(index).items()}
        return tensors | _swiglu(names, block)
    assert isinstance(block, MixtureOfExperts)
    names = {field: spec.name for field, spec in layout.shared_expert(index).items()}
    tensors |= _swiglu(names, block.shared)
    tensors[layout.router(index)["weight"].name] = _bf16(block.router)
    tensors[layout.router(index)["bias"].name] = block.bias.detach().cpu().float()
    for expert in range(block.gate.shape[0]):
        for field, specs in layout.expert(index, expert).items():
            tensors |= _quantized(specs, getattr(block, field)[expert])
    return tensors


def write_weights(folder: Path, network: Network) -> int:
    """Write config.json, generation_config.json, the shards and their index. Returns bytes.

    One shard per layer, embedding, final norm and head in the last, as in the published folder.
    """
    config, layout = network.config, Layout(network.config)
    shards = [
        _layer_tensors(layout, index, layer)
        for index, layer in enumerate(network.layers)
        if isinstance(layer, Layer)
    ]
    shards.append(
        {
            layout.embedding().name: _bf16(network.embedding),
            layout.final_norm().name: _bf16(network.final_norm),
            layout.lm_head().name: _bf16(network.head),
        }
    )
    weight_map, total_bytes = {}, 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        for tensor_name, tensor in tensors.items():
            weight_map[tensor_name] = name
            total_bytes += tensor.numel() * tensor.element_size()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config.to_dict())
    generation: dict[str, object] = {
        "max_length": config.max_position_embeddings,
        "eos_token_id": config.eos_token_id,
    }
    _write_json(folder / "generation_config.json", generation)
    return sum(path.stat().st_size for path in folder.iterdir())


def unpack(linear: QuantizedLinear) -> Tensor:
    """The matrix that packed codes and scales stand for: (out, in) fp32."""
    nibbles = (linear.packed[..., None] >> (4 * torch.arange(8))) & 15
    codes = nibbles.flatten(1).unflatten(1, (-1, GROUP_SIZE)) - 8
    return (codes * linear.scale.float()[..., None]).flatten(1)


@torch.no_grad()
def read_weights(folder: Path, network: Network) -> None:
    """Set the network to what a checkpoint of its dimensions holds, to train on from there.

    Experts come back as their INT4 values: the finer weights they were rounded from are not stored.
    """
    with Checkpoint.open(folder) as checkpoint:
        if checkpoint.config != network.config:
            raise CheckpointError(f"{folder}: config.json is not that of the network to be trained")
        for index, layer in enumerate(network.layers):
            assert isinstance(layer, Layer)
            stored = checkpoint.layer(index)
            layer.input_norm.copy_(stored.input_norm)
            layer.post_attention_norm.copy_(stored.post_attention_norm)
            for field in fields(stored.attention):
                getattr(layer.attention, field.name).copy_(getattr(stored.attention, field.name))
            block = layer.mlp
            plain = block.shared if isinstance(block, MixtureOfExperts) else block
            weights = stored.shared or stored.mlp
            assert weights is not None
            for name in ("gate", "up", "down"):
                getattr(plain, name).copy_(getattr(weights, name))
            if not isinstance(block, MixtureOfExperts):
                continue
            assert stored.router is not None
            block.router.copy_(stored.router.weight)
            block.bias.copy_(stored.router.bias)
            for number in range(block.gate.shape[0]):
                expert = checkpoint.expert(index, number)
                for name in ("gate", "up", "down"):
                    getattr(block, name)[number].copy_(unpack(getattr(expert, name)))
        network.embedding.copy_(checkpoint.embedding())
        network.final_norm.copy_(checkpoint.final_norm())
        network.head.copy_(checkpoint.lm_head())


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
