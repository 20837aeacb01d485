"""The tokenizer: published vectors on the real vocabulary, everything else on a small one."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridk2.errors import TokenizerError
from hybridk2.tokenizer import CONTROL_TOKEN_NAMES, IncrementalDecoder, Tokenizer
from tests.small_vocabulary import (
    BASE_TOKENS,
    small_tokenizer,
    vocabulary_lines,
    write_vocabulary,
)

SMALL = small_tokenizer()
BASE = len(BASE_TOKENS)


@pytest.fixture(scope="module")
def k2_tokenizer(shared_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared_dir / "k2")


# --- the real vocabulary ---------------------------------------------------------------------


def test_all_published_strings_encode_to_the_published_ids(
    k2_tokenizer: Tokenizer, shared_dir: Path
) -> None:
    vectors = json.loads((shared_dir / "k2/vectors/tokenizer.json").read_text())
    assert len(vectors) == 45
    for vector in vectors:
        text = vector["text"]
        assert k2_tokenizer.encode(text) == vector["ids_plain"], text[:80]
        assert k2_tokenizer.encode_with_control(text) == vector["ids_special"], text[:80]
        assert k2_tokenizer.decode(vector["ids_plain"]) == text


def test_the_split_rule_cuts_where_the_published_one_does(
    k2_tokenizer: Tokenizer, shared_dir: Path
) -> None:
    vectors = json.loads((shared_dir / "k2/vectors/tokenizer.json").read_text())
    for vector in vectors:
        # BPE never crosses a cut, so the ids of the whole are the ids of the pieces.
        ids = [i for piece in vector["pieces_plain"] for i in k2_tokenizer.encode(piece)]
        assert ids == vector["ids_plain"], vector["text"][:80]


def test_the_published_numbers_of_k2(k2_tokenizer: Tokenizer) -> None:
    assert k2_tokenizer.vocab_size == 163_840
    assert asdict(k2_tokenizer.control) == {
        "bos": 163584,
        "eos": 163585,
        "im_end": 163586,
        "im_user": 163587,
        "im_assistant": 163588,
        "im_system": 163594,
        "tool_calls_section_begin": 163595,
        "tool_calls_section_end": 163596,
        "tool_call_begin": 163597,
        "tool_call_argument_begin": 163598,
        "tool_call_end": 163599,
        "im_middle": 163601,
        "think": 163606,
        "end_think": 163607,
        "unk": 163838,
        "pad": 163839,
    }
    assert k2_tokenizer.unmapped_ids == (163589, 163592, 163600, *range(163608, 163838))


@pytest.mark.parametrize("unit", ["a", " ", "aA", "中", "!", "\n", "word "])
def test_a_megabyte_in_one_line_comes_back(k2_tokenizer: Tokenizer, unit: str) -> None:
    # 0.1 to 0.4 s on an idle core; one merge loop over the whole line would take minutes.
    text = unit * (1_000_000 // len(unit.encode()))
    assert k2_tokenizer.decode(k2_tokenizer.encode(text)) == text


# --- encoding --------------------------------------------------------------------------------


def test_merges_follow_rank_and_never_cross_a_cut() -> None:
    assert [SMALL.token_bytes(i) for i in SMALL.encode("hello")] == [b"hello"]
    assert [SMALL.token_bytes(i) for i in SMALL.encode("hello wow")] == [b"hello", b" wo", b"w"]
    # A lower-to-upper border is a cut: "hell" and "Ohe", never "hello"-like merges across it.
    assert [SMALL.token_bytes(i) for i in SMALL.encode("hellOhe")] == [b"hell", b"O", b"he"]


def test_names_of_control_tokens_in_text_stay_text() -> None:
    for name in CONTROL_TOKEN_NAMES.values():
        ids = SMALL.encode(f"a{name}b")
        assert max(ids) < BASE
        assert SMALL.decode(ids) == f"a{name}b"


def test_names_of_control_tokens_become_control_tokens_only_where_asked() -> None:
    text = "<|im_user|>hello<|im_end|>"
    control = SMALL.control
    hello = SMALL.encode("hello")
    assert SMALL.encode_with_control(text) == [control.im_user, *hello, control.im_end]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_decode_undoes_encode(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text)) == text


def test_a_lone_surrogate_is_encoded_as_the_replacement_character() -> None:
    assert SMALL.decode(SMALL.encode("a\ud800b")) == "a\ufffdb"


def test_long_runs_are_cut_as_the_published_tokenizer_cuts_them() -> None:
    # Runs of one class are cut every 25,000 characters: an odd 25,001st "l" cannot pair up.
    ll, single = SMALL.encode("ll")[0], SMALL.encode("l")[0]
    assert SMALL.encode("l" * 25_001) == [ll] * 12_500 + [single]
    assert SMALL.encode("l" * 25_002) == [ll] * 12_501
    assert SMALL.encode("l" * 25_001 + " " + "ll")[12_500] == single
    # The run starts anew after white space, wherever that stands.
    assert SMALL.encode("x " + "l" * 25_001)[-1] == single
    # A chunk of 400,000 characters ends between two that would merge.
    text = ("w " * 200_000)[:-1] + "h" + "e"
    he = SMALL.encode("he")[0]
    assert len(text) == 400_001
    assert he not in SMALL.encode(text)


def test_one_tokenizer_serves_many_threads() -> None:
    texts = [f"hello {i} think {'中文' * (i % 5)}\n" * 50 for i in range(64)]
    expected = [SMALL.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(SMALL.encode, texts)) == expected


# --- decoding --------------------------------------------------------------------------------


def test_reserved_ids_without_a_name_decode_to_nothing() -> None:
    assert SMALL.decode([SMALL.encode("l")[0], *SMALL.unmapped_ids, SMALL.encode("l")[0]]) == "ll"
    assert len(SMALL.unmapped_ids) == 256 - 23
    assert SMALL.token_bytes(SMALL.unmapped_ids[0]) == b""


@pytest.mark.parametrize("token_id", [-1, BASE + 256, BASE + 257, 10**9])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        SMALL.decode([0, token_id])
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        IncrementalDecoder(SMALL).push(token_id)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, SMALL.vocab_size - 1), st.integers(128, 255))))
def test_streamed_text_equals_unstreamed_text_for_any_ids(ids: list[int]) -> None:
    decoder = IncrementalDecoder(SMALL)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == SMALL.decode(ids)


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦", "你好", "é́", "🇨🇳", "\U0010ffff"])
def test_characters_split_across_tokens_come_out_whole(text: str) -> None:
    decoder = IncrementalDecoder(SMALL)
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert decoder.flush() == ""


def test_a_decoder_is_ready_for_a_new_text_after_flush_and_after_discard() -> None:
    decoder = IncrementalDecoder(SMALL)
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(0xE4) == ""
    decoder.discard()
    assert decoder.push(ord("a")) == "a"


# --- loading ---------------------------------------------------------------------------------


def test_a_folder_without_config_takes_the_published_names(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_vocabulary(tmp_path))
    assert tokenizer.vocab_size == BASE + 256
    assert tokenizer.control.im_end == BASE + 2
    assert tokenizer.control.think == BASE + 22
    assert tokenizer.control.pad == BASE + 255


def test_lines_may_come_in_any_order(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, vocabulary_lines()[::-1])
    assert Tokenizer.from_folder(tmp_path).encode("hello") == SMALL.encode("hello")


def _write_config(folder: Path, names: dict[int, str]) -> None:
    entries = {str(i): {"content": name, "special": True} for i, name in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))


def test_names_in_the_config_come_before_published_offsets(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    _write_config(tmp_path, {BASE + 30: "<think>", BASE + 31: "<|video|>", BASE + 2: "<|im_end|>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.control.think == BASE + 30
    assert tokenizer.control.end_think == BASE + 23
    assert tokenizer.control_name(BASE + 22) is None
    assert tokenizer.control_id("<|video|>") == BASE + 31
    assert tokenizer.control_id("<|media_begin|>") is None  # named nowhere, needed nowhere
    assert BASE + 22 in tokenizer.unmapped_ids
    assert BASE + 18 in tokenizer.unmapped_ids


def test_ids_past_the_reserved_ones_and_placeholders_are_no_names(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    placeholder = f"<|reserved_token_{BASE + 22}|>"
    _write_config(tmp_path, {BASE + 256: "<|one_too_many|>", BASE + 22: placeholder})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.control_id("<|one_too_many|>") is None
    assert tokenizer.control.think == BASE + 22
    assert max(tokenizer.encode_with_control("<|one_too_many|>")) < BASE


def _line(token: bytes, rank: int) -> bytes:
    return vocabulary_lines([token])[0].split(b" ")[0] + b" %d" % rank


@pytest.mark.parametrize(
    ("line_number", "line", "message"),
    [
        (5, b"not base64 at all", "line 5: expected `base64 rank`"),
        (5, b"AA==", "line 5: expected `base64 rank`"),
        (5, b"", "line 5: expected `base64 rank`"),
        (5, b"BA== -4", "line 5: expected `base64 rank`"),
        (5, b"BA== 4 ", "line 5: expected `base64 rank`"),
        (5, b"BA== " + b"9" * 5000, "line 5: expected `base64 rank`"),
        (5, b"B*== 4", "line 5: the token is not valid base64"),
        (5, b"BA= 4", "line 5: the token is not valid base64"),
        (5, b" 4", "line 5: the token is empty"),
        (5, _line(b"\x04", 3), "line 5: rank 3 appears a second time"),
        (5, _line(b"\x04", BASE), f"line 5: rank {BASE}, but a file of {BASE} tokens"),
        (5, _line(b"\x03", 4), "line 5: the same token bytes as in line 4"),
        (5, _line(b"zz", 4), "1 are missing, the first is 0x04"),
    ],
)
def test_a_damaged_line_is_refused_by_file_and_line(
    tmp_path: Path, line_number: int, line: bytes, message: str
) -> None:
    lines = vocabulary_lines()
    lines[line_number - 1] = line
    write_vocabulary(tmp_path, lines)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert message in str(caught.value)
    assert "tiktoken.model" in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    path = tmp_path / "tiktoken.model"
    content = path.read_bytes()
    for size in (0, 1, 7, 100, 1000):
        path.write_bytes(content[:size])
        with pytest.raises(TokenizerError, match=r"tiktoken\.model"):
            Tokenizer.from_folder(tmp_path)


def test_a_missing_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tiktoken\.model: cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ('{"added_tokens_decoder": [1]}', "expected an object of ids"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "not a token id"),
        (f'{{"added_tokens_decoder": {{"{BASE}": {{}}}}}}', "expected a `content` string"),
        ('{"added_tokens_decoder": {"3": {"content": "a"}}}', "control tokens start at"),
        (
            f'{{"added_tokens_decoder": {{"{BASE}": {{"content": "a"}}, '
            f'"{BASE + 1}": {{"content": "a"}}}}}}',
            "two control tokens have the same name",
        ),
        (
            f'{{"added_tokens_decoder": {{"{BASE + 2}": {{"content": "<eot>"}}}}}}',
            "no control token is named <|im_end|>",
        ),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, config: str, message: str) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert message in str(caught.value)


def test_a_config_nested_without_end_is_refused(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 200_000)
    with pytest.raises(TokenizerError, match="not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_a_config_without_names_takes_the_published_ones(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1}')
    assert Tokenizer.from_folder(tmp_path).control == SMALL.control
