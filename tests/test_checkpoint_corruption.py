"""Random damage to a small checkpoint: always refused by name, never a crash, never accepted.

Every case is damage that changes what the checkpoint says. Left out is what no reader can see:
other codes in the INT4 data, other finite values (`hybridk2 verify` compares checksums), white
space in JSON, and total_size in the index, which nothing depends on.
"""

import json
import math
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridk2.checkpoint import Checkpoint
from hybridk2.errors import HybridK2Error
from hybridk2.experts.loading import load_experts

INDEX = "model.safetensors.index.json"
# A character that a terminal should not see is shown as a question mark.
NAMES_SOMETHING = re.compile(r"[\w.?-]+\.(safetensors|json)|model\.(layers|norm|embed)|lm_head\.")


class Sink:
    """Takes experts as HostExperts does, and drops them."""

    def load_expert(self, slot, expert, gate, up, down) -> None:
        pass


def load_everything(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        load_experts(checkpoint, Sink(), lambda progress: None, threads=2)
        for layer in range(checkpoint.config.num_hidden_layers):
            checkpoint.layer(layer)
        checkpoint.embedding()
        checkpoint.final_norm()
        checkpoint.lm_head()


class Damage:
    """One random corruption of the folder, drawn from `rng`, and what it was, in words."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        self.shards = sorted(folder.glob("*.safetensors"))
        self.what = rng.choice(KINDS)(self)

    def shard(self) -> Path:
        return self.rng.choice(self.shards)

    def flip(self, path: Path, position: int) -> None:
        raw = bytearray(path.read_bytes())
        raw[position] ^= self.rng.randrange(1, 256)
        path.write_bytes(raw)

    def edit_header(self, path: Path, edit: Callable[[dict], None]) -> None:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    def edit_json(self, name: str, edit: Callable[[dict], None]) -> None:
        value = json.loads((self.folder / name).read_text())
        edit(value)
        (self.folder / name).write_text(json.dumps(value))

    def tensors(self, path: Path) -> dict[str, dict]:
        """The header's entries, each with `start`: its offset in the file."""
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__")
        for entry in header.values():
            entry["start"] = 8 + length + entry["data_offsets"][0]
        return header

    # Each kind of damage does it and returns what it did.

    def header_byte(self) -> str:
        path = self.shard()
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        position = self.rng.randrange(8 + length)
        self.flip(path, position)
        return f"byte {position} of the header of {path.name} flipped"

    def truncation(self) -> str:
        path = self.shard()
        size = self.rng.randrange(path.stat().st_size)
        os.truncate(path, size)
        return f"{path.name} cut to {size} bytes"

    def extra_bytes(self) -> str:
        path = self.shard()
        with open(path, "ab") as file:
            file.write(self.rng.randbytes(self.rng.choice([1, 7, 8, 4096])))
        return f"bytes added to {path.name}"

    def missing_bytes(self) -> str:
        path = self.shard()
        raw, count = path.read_bytes(), self.rng.choice([1, 8, 4096])
        position = self.rng.randrange(len(raw) - count)
        path.write_bytes(raw[:position] + raw[position + count :])
        return f"{count} bytes at {position} cut out of {path.name}"

    def swapped_shards(self) -> str:
        one, other = self.rng.sample(self.shards, 2)
        parked = self.folder / "parked"
        one.rename(parked)
        other.rename(one)
        parked.rename(other)
        return f"{one.name} and {other.name} swapped"

    def copied_shard(self) -> str:
        one, other = self.rng.sample(self.shards, 2)
        shutil.copyfile(one, other)
        return f"{one.name} copied over {other.name}"

    def missing_file(self) -> str:
        path = self.rng.choice([*self.shards, self.folder / "config.json", self.folder / INDEX])
        path.unlink()
        return f"{path.name} removed"

    def replaced_file(self) -> str:
        path = self.rng.choice([*self.shards, self.folder / "config.json", self.folder / INDEX])
        content = self.rng.choice(
            [
                b"",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                b"<!DOCTYPE html><html>503 Service Unavailable</html>",
                b"{}",
                self.rng.randbytes(5000),
                bytes(path.stat().st_size),
            ]
        )
        path.write_bytes(content)
        return f"{path.name} replaced by {content[:20]!r}..."

    def header_length(self) -> str:
        path = self.shard()
        raw = path.read_bytes()
        length = self.rng.choice(
            [0, 1, 2, len(raw), len(raw) - 8, 1 << 31, 1 << 63, self.rng.getrandbits(64)]
        )
        path.write_bytes(length.to_bytes(8, "little") + raw[8:])
        return f"header length of {path.name} set to {length}"

    def header_tensor(self) -> str:
        path = self.shard()
        name = self.rng.choice(list(self.tensors(path)))
        number = self.rng.choice([0, 1, -1, 2**31, 2**62, 2**63, 10**40, 1.5, None, "4", [1]])
        edits: list[Callable[[dict], object]] = [
            lambda header: header.pop(name),
            lambda header: header.update({name + "x": header.pop(name)}),
            lambda header: header.update({name + "\udead": dict(header[name])}),
            lambda header: header[name].update(dtype=other_dtype(header[name]["dtype"], self.rng)),
            lambda header: header[name]["shape"].append(1),
            lambda header: header[name]["shape"].__setitem__(-1, number),
            lambda header: header[name].update(shape=number),
            lambda header: header[name]["data_offsets"].__setitem__(
                self.rng.randrange(2), number if number != 0 else 3
            ),
            lambda header: header[name].update(data_offsets=number),
            lambda header: header[name].pop(self.rng.choice(list(header[name]))),
            lambda header: header.update({name: number}),
            lambda header: header.update({"model.layers.7.extra": dict(header[name])}),
        ]
        edit = self.rng.randrange(len(edits))
        before = self.tensors(path)
        self.edit_header(path, edits[edit])
        if self.tensors_or_none(path) == before:  # such as shape[-1] set to the 1 that it was
            self.edit_header(path, edits[0])
        return f"header edit {edit} ({number}) of {name} in {path.name}"

    def tensors_or_none(self, path: Path) -> dict[str, dict] | None:
        try:
            return self.tensors(path)
        except (TypeError, KeyError, IndexError):
            return None

    def doubled_name(self) -> str:
        path = self.shard()
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        one, other = self.rng.sample(list(self.tensors(path)), 2)
        text = raw[8 : 8 + length].replace(f'"{one}"'.encode(), f'"{other}"'.encode())
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        return f"{one} renamed to {other}, which is there too, in {path.name}"

    def index_byte(self) -> str:
        path = self.folder / INDEX
        raw = path.read_bytes()
        visible = [
            position
            for position in range(raw.index(b'"weight_map"'), len(raw))
            if not raw[position : position + 1].isspace()
        ]
        position = self.rng.choice(visible)
        self.flip(path, position)
        return f"byte {position} of the index flipped"

    def index_entry(self) -> str:
        weight_map = json.loads((self.folder / INDEX).read_text())["weight_map"]
        name = self.rng.choice(list(weight_map))
        others = [shard.name for shard in self.shards if shard.name != weight_map[name]]
        places = [*others, "../x.safetensors", "", "x", "config.json", None, 3, ["a"], "x\0", "é"]
        place = self.rng.choice(places)
        edits: list[Callable[[dict], object]] = [
            lambda index: index["weight_map"].pop(name),
            lambda index: index["weight_map"].update({name: place}),
            lambda index: index["weight_map"].update({name + ".more": weight_map[name]}),
            lambda index: index.update(weight_map=self.rng.choice([None, [], {}, "x"])),
            lambda index: index.pop("weight_map"),
        ]
        edit = self.rng.randrange(len(edits))
        self.edit_json(INDEX, edits[edit])
        return f"index edit {edit} of {name} ({place!r})"

    def cut_json(self) -> str:
        path = self.folder / self.rng.choice(["config.json", INDEX, "generation_config.json"])
        text = path.read_bytes().rstrip()
        size = self.rng.randrange(len(text))
        path.write_bytes(text[:size])
        return f"{path.name} cut to {size} bytes"

    def config_field(self) -> str:
        shaping = [
            "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
            "num_hidden_layers", "num_attention_heads", "n_routed_experts", "n_shared_experts",
            "first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim",
        ]  # fmt: skip
        fixed = ["model_type", "architectures", "scoring_func", "n_group", "hidden_act"]
        required = ["routed_scaling_factor", "rms_norm_eps", "rope_theta", "rope_scaling"]

        def edit(config: dict) -> None:
            name = self.rng.choice([*shaping, *fixed, *required, "quantization_config"])
            nonsense = self.rng.choice([None, "x", [], {}, -1, math.inf, True])
            if name in shaping:
                number = config[name]
                nonsense = self.rng.choice(
                    [nonsense, number + 1, number - 1, number * 2, 0, 4096, 10**30]
                )
                if nonsense == number or (name == "first_k_dense_replace" and nonsense is True):
                    nonsense = 2
            config[name] = nonsense
            if name in (*shaping, *required) and self.rng.random() < 0.2:
                del config[name]
            self.edited = f"{name} set to {config.get(name, 'nothing')!r}"

        self.edit_json("config.json", edit)
        return f"config: {self.edited}"

    def quantization(self) -> str:
        changes = {
            "num_bits": [8, 3], "group_size": [64, 128, -1], "symmetric": [False],
            "type": ["float"], "strategy": ["channel"], "actorder": ["group"],
        }  # fmt: skip
        name = self.rng.choice(list(changes))
        value = self.rng.choice(changes[name])
        self.edit_json(
            "config.json",
            lambda config: config["quantization_config"]["config_groups"]["group_0"][
                "weights"
            ].update({name: value}),
        )
        return f"quantization {name} set to {value!r}"

    def value(self) -> str:
        path = self.shard()
        name, entry = self.rng.choice(
            [
                (name, entry)
                for name, entry in self.tensors(path).items()
                if not name.endswith("weight_packed")
            ]
        )
        begin, end = entry["data_offsets"]
        size = {"BF16": 2, "F32": 4, "I32": 4}[entry["dtype"]]
        position = entry["start"] + self.rng.randrange((end - begin) // size) * size
        bad = {
            "BF16": self.rng.choice([0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81]),
            "F32": self.rng.choice([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001]),
            "I32": self.rng.getrandbits(32),
        }[entry["dtype"]]
        raw = bytearray(path.read_bytes())
        struct.pack_into("<H" if size == 2 else "<I", raw, position, bad)
        path.write_bytes(raw)
        return f"a value of {name} in {path.name} set to {bad:#x}"

    def end_token(self) -> str:
        value = self.rng.choice([-1, 512, 10**12, 1.5, "2", [], [1, "2"], [512], True, {}])
        self.edit_json("generation_config.json", lambda config: config.update(eos_token_id=value))
        return f"generation_config eos_token_id set to {value!r}"


KINDS: list[Callable[[Damage], str]] = [
    Damage.header_byte,
    Damage.header_byte,
    Damage.truncation,
    Damage.truncation,
    Damage.extra_bytes,
    Damage.missing_bytes,
    Damage.swapped_shards,
    Damage.copied_shard,
    Damage.missing_file,
    Damage.replaced_file,
    Damage.header_length,
    Damage.header_tensor,
    Damage.header_tensor,
    Damage.doubled_name,
    Damage.index_byte,
    Damage.index_entry,
    Damage.cut_json,
    Damage.config_field,
    Damage.quantization,
    Damage.value,
    Damage.end_token,
]


def other_dtype(dtype: str, rng: random.Random) -> object:
    names = ["BF16", "F16", "F32", "I32", "U32", "I64", "F8_E4M3", "F4", "bf16", "", None, 16]
    return rng.choice([name for name in names if name != dtype])


def assert_refused(pristine: Path, workplace: Path, seed: int) -> None:
    folder = workplace / "checkpoint"
    shutil.copytree(pristine, folder)
    damage = Damage(folder, random.Random(seed))
    try:
        load_everything(folder)
    except HybridK2Error as error:
        message = str(error)
        assert NAMES_SOMETHING.search(message), (
            f"seed {seed}: {damage.what}: names neither file nor tensor: {message}"
        )
        assert len(message) < 2000, f"seed {seed}: {damage.what}: {message[:500]}..."
        message.encode()  # a name from a damaged file must not break a terminal
    else:
        pytest.fail(f"seed {seed}: accepted although {damage.what}")
    finally:
        shutil.rmtree(folder)


def test_the_undamaged_checkpoint_loads(small_checkpoint):
    load_everything(small_checkpoint)


@pytest.mark.parametrize("first_seed", range(0, 150, 10))
def test_random_corruptions_are_refused_by_file_or_tensor_name(
    small_checkpoint, tmp_path, first_seed
):
    for seed in range(first_seed, first_seed + 10):
        assert_refused(small_checkpoint, tmp_path, seed)


@pytest.mark.soak
def test_a_thousand_random_corruptions_with_seeds_of_this_day(small_checkpoint, tmp_path):
    first_seed = random.SystemRandom().randrange(1 << 48)
    for seed in range(first_seed, first_seed + 1000):
        assert_refused(small_checkpoint, tmp_path, seed)
