"""A checkpoint folder is read exactly, or refused by the name of the file and the tensor."""

import errno
import json
import math
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridk2.checkpoint import Checkpoint, ExpertReader
from hybridk2.errors import CheckpointError, HybridK2Error
from hybridk2.synthesis import synthesize, synthetic_config

INDEX = "model.safetensors.index.json"
LAYER_1 = "model-00002-of-000004.safetensors"
EXPERT = "model.layers.1.mlp.experts.3"


@pytest.fixture
def folder(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint that a test may damage."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))


def published_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(shard: Path, name: str, value: torch.Tensor) -> None:
    """Write another tensor under `name`, with everything else as it was."""
    save_file({**load_file(shard), name: value}, shard, metadata={"format": "pt"})


def edit_header(shard: Path, edit) -> None:
    """Rewrite the JSON header of a shard; the data stays."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def read_layer_1(checkpoint: Checkpoint) -> None:
    checkpoint.layer(1)
    for expert in range(checkpoint.config.n_routed_experts):
        checkpoint.expert(1, expert)


def refusal(folder: Path) -> str:
    with pytest.raises(HybridK2Error) as error:
        Checkpoint.open(folder)
    return str(error.value)


def test_every_tensor_is_handed_out_exactly_as_the_safetensors_library_reads_it(small_checkpoint):
    tensors = published_tensors(small_checkpoint)
    with Checkpoint.open(small_checkpoint) as checkpoint:
        handed_out = {
            "model.embed_tokens.weight": checkpoint.embedding(),
            "model.norm.weight": checkpoint.final_norm(),
            "lm_head.weight": checkpoint.lm_head(),
        }
        for n in range(checkpoint.config.num_hidden_layers):
            layer, prefix = checkpoint.layer(n), f"model.layers.{n}."
            attention = layer.attention
            parts = {
                "input_layernorm.weight": layer.input_norm,
                "post_attention_layernorm.weight": layer.post_attention_norm,
                "self_attn.q_a_proj.weight": attention.q_a_proj,
                "self_attn.q_a_layernorm.weight": attention.q_a_norm,
                "self_attn.q_b_proj.weight": attention.q_b_proj,
                "self_attn.kv_a_proj_with_mqa.weight": attention.kv_a_proj,
                "self_attn.kv_a_layernorm.weight": attention.kv_a_norm,
                "self_attn.kv_b_proj.weight": attention.kv_b_proj,
                "self_attn.o_proj.weight": attention.o_proj,
            }
            mlp, where = (layer.shared, "mlp.shared_experts") if n else (layer.mlp, "mlp")
            assert mlp is not None
            for name in ("gate", "up", "down"):
                parts[f"{where}.{name}_proj.weight"] = getattr(mlp, name)
            if n:
                assert layer.router is not None
                assert layer.mlp is None
                parts["mlp.gate.weight"] = layer.router.weight
                parts["mlp.gate.e_score_correction_bias"] = layer.router.bias
                for e in range(checkpoint.config.n_routed_experts):
                    expert = checkpoint.expert(n, e)
                    for name in ("gate", "up", "down"):
                        linear = getattr(expert, name)
                        parts[f"mlp.experts.{e}.{name}_proj.weight_packed"] = linear.packed
                        parts[f"mlp.experts.{e}.{name}_proj.weight_scale"] = linear.scale
            handed_out.update({prefix + name: tensor for name, tensor in parts.items()})
    assert {name for name in tensors if not name.endswith("weight_shape")} == handed_out.keys()
    for name, tensor in handed_out.items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name


def test_the_published_tiny_vector_is_accepted_as_a_single_file_without_index(shared_dir):
    checkpoint = Checkpoint.open(shared_dir / "k2" / "vectors" / "tiny")
    tensors = published_tensors(checkpoint.folder)
    assert checkpoint.eos_token_ids == (122,)
    experts = [t for name, t in tensors.items() if name.endswith(("weight_packed", "weight_scale"))]
    shapes = [t for name, t in tensors.items() if name.endswith("weight_shape")]
    assert checkpoint.expert_bytes == sum(t.nbytes for t in experts)
    assert checkpoint.dense_bytes == sum(
        t.nbytes for t in tensors.values()
    ) - checkpoint.expert_bytes - sum(t.nbytes for t in shapes)
    down = checkpoint.expert(2, 5).down
    assert torch.equal(down.packed, tensors["model.layers.2.mlp.experts.5.down_proj.weight_packed"])


def test_a_k25_folder_yields_the_same_text_model_and_its_vision_part_is_passed_over(
    small_checkpoint, tmp_path
):
    config = synthetic_config("tiny", variant="k2.5")
    synthesize(tmp_path / "k25", config, 0)
    k25 = Checkpoint.open(tmp_path / "k25")
    assert any("vision_tower" in name for name in published_tensors(tmp_path / "k25"))
    assert k25.config.rope_scaling.beta_fast == 32
    thinking = Checkpoint.open(small_checkpoint)
    assert k25.expert_bytes == thinking.expert_bytes
    assert k25.dense_bytes == thinking.dense_bytes
    name = "language_model.model.layers.1.mlp.experts.0.up_proj.weight_scale"
    assert torch.equal(k25.expert(1, 0).up.scale, published_tensors(k25.folder)[name])


def test_vision_tensors_are_unexpected_in_a_folder_that_says_it_is_k2_thinking(folder):
    shard = folder / "model-00004-of-000004.safetensors"
    edit_tensor(shard, "vision_tower.stand_in.weight", torch.zeros(4, dtype=torch.bfloat16))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["vision_tower.stand_in.weight"] = shard.name
    (folder / INDEX).write_text(json.dumps(index))
    assert "vision_tower.stand_in.weight" in refusal(folder)


def test_handed_out_tensors_own_their_memory(small_checkpoint):
    checkpoint = Checkpoint.open(small_checkpoint)
    first = checkpoint.expert(1, 0)
    kept = first.gate.packed.clone()
    second = checkpoint.expert(1, 1)
    assert first.gate.packed.data_ptr() != second.gate.packed.data_ptr()
    checkpoint.close()
    assert torch.equal(first.gate.packed, kept)


def test_an_expert_reader_uses_one_memory_for_all_experts(small_checkpoint):
    checkpoint = Checkpoint.open(small_checkpoint)
    reader = ExpertReader(checkpoint)
    first = reader.read(1, 0)
    address, bytes_of_first = first.down.scale.data_ptr(), first.down.scale.clone()
    second = reader.read(2, 7)
    assert second.down.scale.data_ptr() == address
    assert not torch.equal(second.down.scale, bytes_of_first)
    assert torch.equal(second.down.scale, checkpoint.expert(2, 7).down.scale)


def test_experts_come_in_the_order_in_which_the_files_hold_them(small_checkpoint):
    checkpoint = Checkpoint.open(small_checkpoint)
    order = list(checkpoint.experts_in_file_order())
    assert sorted(order) == [(layer, expert) for layer in (1, 2) for expert in range(8)]
    shard, name = "model-00003-of-000004.safetensors", "mlp.experts.{}.gate_proj.weight_packed"
    raw = (small_checkpoint / shard).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    begins = [header[f"model.layers.2.{name.format(e)}"]["data_offsets"][0] for _, e in order[8:]]
    assert begins == sorted(begins)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weight_shape_may_be_int32_or_int64(folder, dtype):
    tensors = load_file(folder / LAYER_1)
    for name in tensors:
        if name.endswith("weight_shape"):
            tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / LAYER_1)
    expert = Checkpoint.open(folder).expert(1, 3)
    assert torch.equal(expert.up.packed, tensors[f"{EXPERT}.up_proj.weight_packed"])


def test_tensors_of_one_expert_may_lie_in_different_shards(folder):
    name = f"{EXPERT}.up_proj.weight_scale"
    tensors, last = load_file(folder / LAYER_1), "model-00004-of-000004.safetensors"
    moved = tensors.pop(name)
    save_file(tensors, folder / LAYER_1)
    edit_tensor(folder / last, name, moved)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = last
    (folder / INDEX).write_text(json.dumps(index))
    assert torch.equal(Checkpoint.open(folder).expert(1, 3).up.scale, moved)


def test_generation_config_decides_what_ends_an_answer_and_config_does_without_it(folder):
    path = folder / "generation_config.json"
    edit_json(path, eos_token_id=[258, 511, 258])
    assert Checkpoint.open(folder).eos_token_ids == (258, 511)
    path.unlink()
    assert Checkpoint.open(folder).eos_token_ids == (Checkpoint.open(folder).config.eos_token_id,)
    path.write_text("{}")
    assert len(Checkpoint.open(folder).eos_token_ids) == 1
    path.write_text('{"eos_token_id": 512}')
    assert "generation_config.json: eos_token_id" in refusal(folder)


def test_a_path_that_is_no_checkpoint_folder_is_refused_with_the_reason(folder, tmp_path):
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert "found a file" in refusal(folder / "config.json")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refusal(tmp_path / "empty")
    (folder / INDEX).unlink()
    assert f"expected {INDEX} or model.safetensors" in refusal(folder)


def test_a_shard_that_may_not_be_read_is_refused_by_name(folder, monkeypatch):
    really_open = os.open

    def deny_layer_1(path, *arguments):
        if Path(path).name == LAYER_1:  # file modes would not bind a test that runs as root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really_open(path, *arguments)

    monkeypatch.setattr(os, "open", deny_layer_1)
    assert f"{LAYER_1}: cannot be opened: Permission denied" in refusal(folder)


def test_every_missing_shard_is_listed(folder):
    (folder / LAYER_1).unlink()
    (folder / "model-00001-of-000004.safetensors").unlink()
    message = refusal(folder)
    assert "2 of 4 shards are missing" in message
    assert LAYER_1 in message
    assert "model-00001-of-000004.safetensors" in message
    assert "Is the download complete?" in message


def test_a_broken_link_of_a_hub_cache_counts_as_a_missing_shard(folder):
    (folder / LAYER_1).unlink()
    (folder / LAYER_1).symlink_to("../blobs/that-was-never-fetched")
    assert "1 of 4 shards are missing" in refusal(folder)


def test_a_git_lfs_pointer_is_recognised(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9810000000\n"
    (folder / LAYER_1).write_text(pointer)
    message = refusal(folder)
    assert f"{LAYER_1}: this is a Git LFS pointer" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_something_else_in_the_place_of_a_shard_is_refused_and_does_not_hang(folder, what):
    (folder / LAYER_1).unlink()
    (folder / LAYER_1).mkdir() if what == "folder" else os.mkfifo(folder / LAYER_1)
    assert f"{LAYER_1}: expected a file" in refusal(folder)


def test_swapped_shards_are_refused_by_the_tensor_that_is_not_where_the_index_says(folder):
    other = folder / "model-00003-of-000004.safetensors"
    (folder / LAYER_1).rename(folder / "parked")
    other.rename(folder / LAYER_1)
    (folder / "parked").rename(other)
    message = refusal(folder)
    assert f"expected in {LAYER_1}, found it in {other.name}" in message


def test_an_index_cannot_point_out_of_its_folder(folder):
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / LAYER_1, outside)
    index = json.loads((folder / INDEX).read_text())
    for shard in ("../outside.safetensors", str(outside), "a/../../outside.safetensors"):
        index["weight_map"]["lm_head.weight"] = shard
        (folder / INDEX).write_text(json.dumps(index))
        message = refusal(folder)
        assert "'lm_head.weight': expected the name of a .safetensors file" in message


def test_a_tensor_in_two_shards_is_refused(folder):
    name = "model.layers.1.input_layernorm.weight"
    edit_tensor(
        folder / "model-00003-of-000004.safetensors", name, load_file(folder / LAYER_1)[name]
    )
    assert f"{name}': is in {LAYER_1} too" in refusal(folder)


def test_a_tensor_that_the_index_does_not_list_is_refused(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][f"{EXPERT}.up_proj.weight_scale"]
    (folder / INDEX).write_text(json.dumps(index))
    message = refusal(folder)
    assert LAYER_1 in message
    assert f"{EXPERT}.up_proj.weight_scale" in message


def test_a_wrong_shape_is_refused_with_what_was_expected_and_found(folder):
    name = f"{EXPERT}.up_proj.weight_packed"
    packed = load_file(folder / LAYER_1)[name]
    edit_tensor(folder / LAYER_1, name, packed[:, : packed.shape[1] // 2].contiguous())
    rows, words = packed.shape
    assert (
        f"{LAYER_1}: {name}: expected I32 ({rows}, {words}) as config.json implies, "
        f"found I32 ({rows}, {words // 2})"
    ) in refusal(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.1.mlp.gate.e_score_correction_bias", torch.bfloat16),
        ("model.layers.1.input_layernorm.weight", torch.float16),
        (f"{EXPERT}.gate_proj.weight_packed", torch.uint32),
    ],
)
def test_a_wrong_dtype_is_refused_by_tensor_name(folder, name, dtype):
    edit_tensor(folder / LAYER_1, name, load_file(folder / LAYER_1)[name].to(dtype))
    assert f"{LAYER_1}: {name}: expected " in refusal(folder)


def test_a_header_length_that_no_file_can_have_costs_no_memory(folder):
    raw = (folder / LAYER_1).read_bytes()
    for length in (1 << 63, (1 << 64) - 1, 1 << 40, len(raw) - 7):
        (folder / LAYER_1).write_bytes(length.to_bytes(8, "little") + raw[8:])
        tracemalloc.start()
        message = refusal(folder)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert f"found a header length of {length}" in message
        assert peak_bytes < 4 * len(raw) + (1 << 20)


def test_a_config_that_promises_millions_of_tensors_costs_neither_memory_nor_time(folder):
    edit_json(folder / "config.json", n_routed_experts=4096, num_hidden_layers=1000)
    tracemalloc.start()
    message = refusal(folder)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "model.layers.1.mlp.gate" in message
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda header, a, b: header[b].update(data_offsets=header[a]["data_offsets"]), "overlaps"),
        (lambda header, a, b: header.pop(a), "leaves a hole after"),
        (lambda header, a, b: header[a].update(data_offsets=[0, 1 << 62]), "takes 512 bytes"),
        (lambda header, a, b: header[a].update(data_offsets=[9, 3]), "no byte range"),
        (lambda header, a, b: header[a].update(shape=[1 << 63]), "is no shape"),
        (lambda header, a, b: header[a].update(shape=[-4, -8]), "is no shape"),
        (lambda header, a, b: header[a].update(shape=[True] * 6), "is no shape"),
        (lambda header, a, b: header[a].update(shape="32"), "is no shape"),
        (lambda header, a, b: header[a].update(dtype="I33"), "unknown dtype 'I33'"),
        (lambda header, a, b: header[a].update(dtype=[]), "unknown dtype"),
        (lambda header, a, b: header[a].update(more=1), "expected dtype, shape and data_offsets"),
        (lambda header, a, b: header.update({a: 7}), "expected dtype, shape and data_offsets"),
        (lambda header, a, b: header.update(__metadata__={"format": "tf"}), "__metadata__"),
        (lambda header, a, b: header.update(__metadata__=[1]), "__metadata__"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(folder, edit, complaint):
    names = [f"{EXPERT}.{linear}_proj.weight_scale" for linear in ("gate", "up")]
    edit_header(folder / LAYER_1, lambda header: edit(header, *names))
    message = refusal(folder)
    assert LAYER_1 in message
    assert complaint in message


def test_a_key_that_occurs_twice_is_refused_in_header_index_and_config(folder):
    def repeat_first_key(text: str) -> str:
        key = text[1 : text.index(":") + 1]
        return f"{{{key}{{}},{text[1:]}"

    raw = (folder / LAYER_1).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = repeat_first_key(raw[8 : 8 + length].decode()).encode()
    damaged = len(header).to_bytes(8, "little") + header + raw[8 + length :]
    (folder / LAYER_1).write_bytes(damaged)
    assert "occurs twice" in refusal(folder)
    (folder / LAYER_1).write_bytes(raw)
    for name in (INDEX, "config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(repeat_first_key(text))
        message = refusal(folder)
        assert name in message
        assert "occurs twice" in message
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "\xff", '{"a": NaN}', '{"a": ' + "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"],
    ids=["empty", "cut", "list", "latin-1", "NaN", "nested", "digits"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
def test_json_that_is_none_is_refused_by_file_name(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    assert name in refusal(folder)


def test_bytes_after_the_last_tensor_are_refused(folder):
    with open(folder / LAYER_1, "ab") as file:
        file.write(b"\0")
    assert f"{LAYER_1}: expected " in refusal(folder)


def test_a_shard_that_shrinks_after_it_was_opened_is_an_error_with_the_tensor_s_name(folder):
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / LAYER_1, (folder / LAYER_1).stat().st_size // 2)
    with pytest.raises(CheckpointError, match=rf"{LAYER_1}: model\.layers\.1\..*the file ends at"):
        read_layer_1(checkpoint)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        f"{EXPERT}.down_proj.weight_scale",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_tensor_and_element(folder, name, bad):
    tensor = load_file(folder / LAYER_1)[name]
    element = tuple(size // 2 for size in tensor.shape)
    tensor[element] = bad
    edit_tensor(folder / LAYER_1, name, tensor)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError) as error:
        read_layer_1(checkpoint)
    assert f"{LAYER_1}: {name}: " in str(error.value)
    assert f"element {element}" in str(error.value)


def test_the_largest_finite_values_are_accepted(folder):
    name = "model.layers.1.self_attn.o_proj.weight"
    tensor = load_file(folder / LAYER_1)[name]
    tensor[0, 0], tensor[-1, -1] = torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min
    edit_tensor(folder / LAYER_1, name, tensor)
    assert torch.equal(Checkpoint.open(folder).layer(1).attention.o_proj, tensor)


def test_an_element_is_named_rightly_in_a_tensor_larger_than_one_piece(folder, monkeypatch):
    monkeypatch.setattr("hybridk2.checkpoint.reader._PIECE_BYTES", 1 << 10)
    monkeypatch.setattr("hybridk2.checkpoint.reader._CHECK_ELEMENTS", 100)
    shard, name = folder / "model-00004-of-000004.safetensors", "lm_head.weight"
    tensor = load_file(shard)[name]
    assert torch.equal(Checkpoint.open(folder).lm_head(), tensor)
    tensor[317, 5] = math.nan
    edit_tensor(shard, name, tensor)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .* element \(317, 5\)"):
        Checkpoint.open(folder).lm_head()


def test_a_weight_shape_with_other_values_is_refused_before_the_expert_is_used(folder):
    name = f"{EXPERT}.up_proj.weight_shape"
    shape = load_file(folder / LAYER_1)[name]
    edit_tensor(folder / LAYER_1, name, shape.flip(0))
    checkpoint = Checkpoint.open(folder)
    checkpoint.expert(1, 2)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.expert(1, 3)
