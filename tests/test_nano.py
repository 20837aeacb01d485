"""K2-nano: its corpus, what it may never have seen, its training maths, its checkpoint."""

import dataclasses
import itertools
import json
import random
from decimal import Decimal
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch.nn.attention.flex_attention import create_block_mask

from hybridk2.assistant import Assistant
from hybridk2.chat.template import render
from hybridk2.checkpoint import Checkpoint, locate_model
from hybridk2.config import EngineConfig
from hybridk2.errors import CheckpointError
from hybridk2.nano import comparison, evaluate, phrasing, tools, train
from hybridk2.nano.attention_masks import PackedDocuments
from hybridk2.nano.cases import COMPARISON, SUITES, TOOL_ANSWER, TOOL_CALL, Reply, draw_cases
from hybridk2.nano.conversation import conversation
from hybridk2.nano.corpus import PADDING, TARGET, Renderer, batches
from hybridk2.nano.export import pack, read_weights, write_weights
from hybridk2.nano.generation import generate, parse_reply
from hybridk2.nano.muon import orthogonalize
from hybridk2.nano.network import MixtureOfExperts, Network, as_stored, nano_config, quantize
from hybridk2.nano.vocabulary import train_vocabulary
from hybridk2.nano.words import CITIES, NOUNS, Draw, held_out, pseudo_word
from hybridk2.tokenizer import Tokenizer

NANO = locate_model("nano")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network(nano_config(train.BASE_VOCABULARY))


@pytest.fixture(scope="module")
def assistant():
    loaded = Assistant.load(EngineConfig(model="nano", threads=1))
    yield loaded
    loaded.close()


# --- the corpus ---------------------------------------------------------------------------------


def test_the_thought_about_two_numbers_ends_with_the_true_relation():
    draw = Draw(1)
    for _ in range(2000):
        first, second = comparison.number_pair(draw)
        difference = Decimal(first) - Decimal(second)
        sign = "=" if difference == 0 else "<" if difference < 0 else ">"
        thought, found = comparison.compare(first, second)
        assert found == sign, thought
        assert thought.endswith(f"So {first} {sign} {second}.")


@pytest.mark.parametrize("evaluation", [False, True])
def test_every_comparison_accepts_its_own_answer_and_not_another_one(evaluation):
    draw = Draw(2, evaluation=evaluation)
    for _ in range(500):
        case = comparison.comparison(draw)
        assert comparison.comparison_is_right(case.check, case.answer), case
        assert not comparison.comparison_is_right(case.check, "I do not know."), case


def test_the_famous_pair_is_held_out_in_every_spelling():
    for first, second in itertools.permutations(("9.11", "9.9", "9.110", "9.90", "09.9"), 2):
        if Decimal(first) != Decimal(second):
            assert comparison.pair_is_held_out(first, second)


def test_training_and_evaluation_share_no_number_pair_tool_or_made_up_word():
    sides = []
    for evaluation in (False, True):
        draw = Draw(3, evaluation=evaluation)
        talks = [conversation(draw, task) for task in ("comparison", "tool") for _ in range(150)]
        pairs = {frozenset(map(Decimal, comparison.number_pair(draw))) for _ in range(1000)}
        names = {tool["function"]["name"] for talk in talks for tool in talk.tools or []}
        places = {draw.word(CITIES) for _ in range(1000)}
        nouns = {draw.word(NOUNS) for _ in range(2000)}
        made_up = {draw.fresh(lambda draw=draw: pseudo_word(draw)) for _ in range(1000)}
        sides.append((pairs, names, places, nouns, made_up))
    for trained, kept in zip(*sides, strict=True):
        assert trained
        assert kept
        assert not trained & kept
    assert held_out("Beijing")
    assert held_out("get_weather")


def test_equal_seeds_give_equal_conversations():
    first, second = ([conversation(draw) for _ in range(50)] for draw in (Draw(4), Draw(4)))
    for one, other in zip(first, second, strict=True):
        assert (one.messages, one.tools) == (other.messages, other.tools)


def test_training_renders_exactly_what_the_chat_template_renders(tokenizer):
    draw, renderer = Draw(5), Renderer(tokenizer)
    for _ in range(150):
        talk = conversation(draw)
        ids, marks = renderer.render(talk)
        for index in range(talk.last_user_turn() + 1, len(talk.messages)):
            if talk.messages[index]["role"] != "assistant":
                continue
            prompt = render(talk.messages[:index], talk.tools, tokenizer)
            assert ids[: len(prompt)] == prompt
            # The model must produce what follows, and nothing before it belongs to this turn.
            assert marks[len(prompt)] == TARGET
            assert marks[len(prompt) - 1] != TARGET


def test_a_batch_holds_whole_documents_and_pads_the_rest(tokenizer):
    batch = next(batches(tokenizer, 6, 4096))
    used = int(np.argmax(batch.marks == PADDING)) or batch.marks.size
    assert (batch.marks[used:] == PADDING).all()
    assert (batch.starts[used:] == np.arange(used, batch.starts.size)).all()
    firsts = np.unique(batch.starts[:used])
    for first, following in zip(firsts, [*firsts[1:], used], strict=True):
        assert (batch.starts[first:following] == first).all()
        assert batch.tokens[first] == tokenizer.control.im_system
        assert batch.tokens[following - 1] == tokenizer.control.im_end


def test_a_reply_is_right_only_with_the_exact_call():
    case = next(case for case in draw_cases(7, {TOOL_CALL: 20}) if len(case.talk.calls) == 1)
    call = case.talk.calls[0]
    number = sum(len(message.get("tool_calls", ())) for message in case.messages)
    exact = (f"functions.{call.tool.name}:{number}", call.tool.name, json.dumps(call.arguments))
    assert case.is_right(Reply("", (exact,), ended=True))
    assert not case.is_right(Reply("", (exact,), ended=False))
    assert not case.is_right(Reply("", (exact, exact), ended=True))
    assert not case.is_right(Reply("", ((exact[0], exact[1] + "x", exact[2]),), ended=True))
    assert not case.is_right(Reply("", ((*exact[:2], '{"other": 1}'),), ended=True))
    assert not case.is_right(Reply("", ((*exact[:2], "{"),), ended=True))


def test_an_answer_from_a_result_must_contain_every_value():
    case = draw_cases(8, {TOOL_ANSWER: 1})[0]
    answer = case.talk.messages[-1]["content"]
    assert case.is_right(Reply(answer, (), ended=True))
    assert not case.is_right(Reply(answer.replace(case.talk.values[-1], ""), (), ended=True))


# --- the vocabulary -----------------------------------------------------------------------------


def test_a_word_is_cut_alike_after_a_space_a_quote_and_a_bracket(tokenizer):
    """Else copying an unseen name from a question into JSON would mean spelling it anew."""
    draw = Draw(9)
    for _ in range(300):
        word = pseudo_word(draw).capitalize()
        quoted, spaced, called = (
            [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]
            for text in (f'": "{word}', f" {word}", f"({word}")
        )
        bare = [tokenizer.token_bytes(i) for i in tokenizer.encode(word)]
        assert quoted[-len(bare) :] == bare
        assert called == [b"(", *bare]
        assert b"".join(spaced) == b" " + b"".join(bare)
        assert spaced[-len(bare) + 1 :] == bare[1:] or len(bare) == 1


def test_every_digit_is_a_token_of_its_own(tokenizer):
    for text in ("9.11", "12345", " 42", "v2", "x10y", "2025-01-31"):
        for token_id in tokenizer.encode(text):
            token = tokenizer.token_bytes(token_id)
            assert len(token) == 1 or not any(48 <= byte <= 57 for byte in token)


def test_the_vocabulary_has_the_size_that_was_asked_for_and_every_byte():
    texts = [" ".join(random.Random(n).sample(NOUNS, 40)) for n in range(40)]
    tokens = train_vocabulary(texts, 400)
    assert len(tokens) == len(set(tokens)) == 400
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)
    with pytest.raises(ValueError, match="400000 were asked for"):
        train_vocabulary(texts, 400_000)


# --- the network --------------------------------------------------------------------------------


def test_quantisation_uses_fifteen_codes_and_reproduces_itself():
    weight = torch.randn(8, 128)
    codes, scales = quantize(weight)
    assert codes.abs().max() == 7
    assert (scales == scales.bfloat16().float()).all()
    # Half a step, and bf16's rounding of the scale (2^-9 of it) seven codes out.
    stored = (codes * scales).flatten(1)
    step = scales.expand_as(codes).flatten(1)
    assert ((stored - weight).abs() <= step * (0.5 + 7 * 2**-8)).all()
    again, same_scales = quantize(stored)
    assert torch.equal(again, codes)
    assert torch.equal(same_scales, scales)


def test_codes_are_packed_lowest_nibble_first():
    # The published test vector: one group of 32 codes and its four words.
    codes = [-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 0]
    codes += [7, -7, 3, -3, 1, -1, 0, 0, 2, -2, 4, -4, 6, -6, 5, -5]
    words = pack(torch.tensor(codes, dtype=torch.float32).view(1, 1, 32))
    assert words.dtype == torch.int32
    assert words.shape == (1, 4)
    expected = ["87654321", "8fedcba9", "88795b1f", "3d2e4c6a"]
    assert [f"{word & 0xFFFFFFFF:08x}" for word in words[0].tolist()] == expected


def test_the_dense_block_is_the_sum_of_the_chosen_experts(network):
    mixture = network.mixtures()[0].eval()
    experts, top_k = mixture.config.n_routed_experts, mixture.config.num_experts_per_tok
    mixture.bias.copy_(torch.linspace(-0.2, 0.2, experts))
    x = torch.randn(9, mixture.config.hidden_size, dtype=torch.float64).bfloat16()
    scores = (x.float() @ mixture.router.float().bfloat16().float().T).sigmoid()
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        chosen = (scores[token] + mixture.bias).topk(top_k).indices.tolist()
        share = scores[token, chosen] / scores[token, chosen].sum()
        for expert, weight in zip(chosen, share.tolist(), strict=True):
            gate, up, down = (
                as_stored(getattr(mixture, name)[expert]).double()
                for name in ("gate", "up", "down")
            )
            inner = F.silu(gate @ x[token].double()) * (up @ x[token].double())
            expected[token] += weight * mixture.config.routed_scaling_factor * (down @ inner)
    found = (mixture(x) - mixture.shared(x)).double()
    # bf16 activations: gate, up, silu, product, weight and the two sums round by 2^-9 each.
    error = (found - expected).norm() / expected.norm()
    assert error < 8 * 2**-9, error


def test_the_bias_moves_towards_idle_experts():
    mixture = MixtureOfExperts(nano_config(train.BASE_VOCABULARY))
    mixture.load.copy_(torch.arange(32.0))
    mixture.balance(0.5)
    assert (mixture.bias[:16] == 0.5).all()
    assert (mixture.bias[16:] == -0.5).all()
    assert (mixture.load == 0).all()


def test_packed_documents_do_not_see_each_other(network):
    network.eval()
    tokens = torch.randint(0, 1000, (96,))
    starts = torch.zeros(96, dtype=torch.int32)
    starts[40:] = 40
    attend = PackedDocuments(96, network.config.softmax_scale, torch.device("cpu"), by_blocks=False)
    with torch.inference_mode():
        attend.set_documents(starts)
        packed = network(tokens, torch.arange(96) - starts, attend)
        alone = PackedDocuments(
            56, network.config.softmax_scale, torch.device("cpu"), by_blocks=False
        )
        alone.set_documents(torch.zeros(56, dtype=torch.int32))
        second = network(tokens[40:], torch.arange(56), alone)
    network.train()
    # The same sums in another order: bf16 steps of values of order 1, a few of them.
    assert (packed[40:] - second).abs().median() <= 2**-8


def test_the_block_mask_is_the_one_that_the_documents_imply():
    size = 512
    attend = PackedDocuments(size, 1.0, torch.device("cpu"), by_blocks=True)
    for seed in range(4):
        cuts = sorted(random.Random(seed).sample(range(1, size), 4 * seed))
        starts = torch.zeros(size, dtype=torch.int32)
        for cut in cuts:
            starts[cut:] = cut
        attend.set_documents(starts)

        def allowed(batch, head, query, key, starts=starts):
            return (key <= query) & (key >= starts[query])

        expected = create_block_mask(allowed, 1, 1, size, size, device="cpu").to_dense()[0, 0]
        mask = attend.mask
        assert torch.equal(mask.to_dense()[0, 0], expected)
        by_key = torch.zeros_like(expected)
        for key, count in enumerate(mask.q_num_blocks[0, 0].tolist()):
            by_key[mask.q_indices[0, 0, key, :count].long(), key] = 1
        assert torch.equal(by_key, expected)


def test_generation_does_not_depend_on_the_padding(network):
    network.eval()
    prompts = [[5, 6, 7, 8, 9, 10], [300, 301]]
    together = generate(network, prompts, max_new=4, pad=2047, stop=2046)
    alone = [generate(network, [prompt], max_new=4, pad=2047, stop=2046)[0] for prompt in prompts]
    network.train()
    assert together == alone


def test_a_reply_is_parsed_into_text_and_calls(tokenizer):
    control = tokenizer.control
    call = [
        control.tool_call_begin,
        *tokenizer.encode("functions.a.b-c:3"),
        control.tool_call_argument_begin,
        *tokenizer.encode('{"x": 1}'),
        control.tool_call_end,
    ]
    ids = [control.think, *tokenizer.encode("hm"), control.end_think, *tokenizer.encode("Well")]
    ids += [control.tool_calls_section_begin, *call, control.tool_calls_section_end]
    reply = parse_reply([*ids, control.im_end], tokenizer)
    assert reply == Reply("Well", (("functions.a.b-c:3", "a.b-c", '{"x": 1}'),), ended=True)
    assert not parse_reply(ids, tokenizer).ended


def test_muon_makes_steps_of_even_strength():
    updates = orthogonalize(torch.randn(3, 64, 32))
    strengths = torch.linalg.svdvals(updates.float())
    # Five iterations of the fast polynomial leave singular values between about 0.7 and 1.2.
    assert strengths.min() > 0.5
    assert strengths.max() < 1.4


def test_training_lowers_the_loss(tokenizer):
    torch.manual_seed(1)
    trainer = train.Trainer(Network(nano_config(train.BASE_VOCABULARY)), 256, compiled=False)
    batch = next(batches(tokenizer, 10, 256))
    losses = []
    for step in range(3):
        loss, _, count = trainer.step(batch, step + train.WARMUP_STEPS, 0.0).tolist()
        losses.append(loss / count)
    assert losses[-1] < losses[0] - 0.5, losses


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    assert train.rate_factor(0, 0.0) == 1 / train.WARMUP_STEPS
    assert train.rate_factor(1000, train.CONSTANT_SHARE) == 1.0
    assert train.rate_factor(1000, 1.0) == 0.0


# --- the checkpoint -----------------------------------------------------------------------------


def test_an_exported_network_opens_as_a_checkpoint_with_the_same_weights(network, tmp_path):
    write_weights(tmp_path, network)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == network.config
    layer = network.layers[2]
    assert torch.equal(
        checkpoint.layer(2).attention.kv_b_proj, layer.attention.kv_b_proj.detach().bfloat16()
    )
    expert = checkpoint.expert(2, 31)
    for name in ("gate", "up", "down"):
        linear = getattr(expert, name)
        nibbles = torch.stack([(linear.packed >> (4 * n)) & 15 for n in range(8)], -1).flatten(1)
        weight = (nibbles.unflatten(1, (-1, 32)) - 8) * linear.scale.float()[..., None]
        expected = as_stored(getattr(layer.mlp, name)[31])
        assert torch.equal(weight.flatten(1).bfloat16(), expected)


def test_training_goes_on_from_exactly_what_a_checkpoint_stores(tmp_path):
    torch.manual_seed(1)
    other = Network(nano_config(train.BASE_VOCABULARY))
    read_weights(NANO, other)
    write_weights(tmp_path, other)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (NANO / file.name).read_bytes(), file.name


def test_a_checkpoint_of_other_dimensions_is_refused():
    smaller = Network(dataclasses.replace(nano_config(train.BASE_VOCABULARY), num_hidden_layers=2))
    with pytest.raises(CheckpointError, match="not that of the network"):
        read_weights(NANO, smaller)


def test_what_follows_a_value_is_set_apart_from_it():
    """Or nobody could tell where the value ends: "play The Tall Horse I need to know"."""
    draw = Draw(3)
    closed = {phrasing.framed(draw, "play {song}") for _ in range(2000)}
    after = {text.partition("{song}")[2] for text in closed}
    assert len(after) > 15
    assert all(text == "" or text[0] in ".," for text in after)
    pair = tools.declare_several(draw, 2)
    with patch.object(tools, "request", lambda *_: tools.Request("play The Tall Horse", ())):
        joined = {tools.joint_request(draw, *pair).question for _ in range(200)}
    assert len(joined) > 3
    assert not any(question.startswith("play The Tall Horse play") for question in joined)


def test_k2_nano_has_every_structural_feature_in_twelve_megabytes():
    config = Checkpoint.open(NANO).config
    assert sum(path.stat().st_size for path in Path(NANO).iterdir()) <= 12_000_000
    assert config.num_moe_layers >= 4
    assert config.n_routed_experts >= 32
    assert config.num_experts_per_tok >= 4
    assert config.first_k_dense_replace == config.n_shared_experts == 1
    assert config.rope_scaling.factor > 1
    assert config.rope_scaling.beta_fast == 1.0
    assert config.routed_scaling_factor == 2.827


def test_k2_nano_uses_the_codes_and_the_bias_that_k2_uses():
    checkpoint = Checkpoint.open(NANO)
    seen = set()
    for layer in range(1, checkpoint.config.num_hidden_layers):
        router = checkpoint.layer(layer).router
        assert router is not None
        assert router.bias.std() > 0.01  # it was learned
        for expert in range(0, 32, 8):
            packed = checkpoint.expert(layer, expert).gate.packed
            seen |= {
                code for n in range(8) for code in ((packed >> (4 * n)) & 15).unique().tolist()
            }
    assert seen == set(range(1, 16))  # nibble 0, code -8, is never used


def test_k2_nano_compares_the_famous_numbers_and_thinks_first(assistant):
    case = draw_cases(1, {COMPARISON: 1})[0]
    case.talk.messages[:] = [
        {"role": "user", "content": "which one is bigger, 9.11 or 9.9? think carefully."},
        {"role": "assistant", "content": "", "reasoning_content": ""},
    ]
    reply, tokens = evaluate.ask(assistant, case)
    assert reply == Reply("9.9 is bigger than 9.11.", (), ended=True)
    assert tokens > 30


def test_k2_nano_calls_a_tool_it_has_never_seen(assistant):
    case = draw_cases(1, {TOOL_CALL: 1})[0]
    case.talk.messages[:] = [
        {
            "role": "user",
            "content": "What's the weather like in Beijing today? Use the tool to check.",
        },
        {"role": "assistant", "content": "", "reasoning_content": ""},
    ]
    parameters = {
        "type": "object",
        "required": ["city"],
        "properties": {"city": {"type": "string", "description": "Name of the city"}},
    }
    about = "Retrieve current weather information. Call this when the user asks about the weather."
    function = {"name": "get_weather", "description": about, "parameters": parameters}
    case.talk.tools = [{"type": "function", "function": function}]
    reply, _ = evaluate.ask(assistant, case)
    call = ("functions.get_weather:0", "get_weather", '{"city": "Beijing"}')
    assert reply == Reply("", (call,), ended=True)


def test_k2_nano_is_right_about_fresh_cases_of_every_suite(assistant):
    counts = {suite: 2 for suite, (_, least) in SUITES.items() if least is not None}
    outcomes = [evaluate.judge(assistant, case) for case in draw_cases(12, counts)]
    wrong = [outcome.report for outcome in outcomes if not outcome.right]
    assert len(wrong) <= 1, wrong  # the promise is a share; `evaluate` measures it


def test_evaluation_fails_for_a_model_that_answers_nothing(monkeypatch):
    monkeypatch.setattr(evaluate.multiprocessing, "get_context", lambda method: _SilentContext())
    result = CliRunner().invoke(evaluate.main, ["--seed", "1", "--cases", "2", "--failures"])
    assert result.exit_code == 1
    assert result.output.count("0.0%") == len(SUITES)


class _SilentContext:
    """A process pool whose model says nothing."""

    def Pool(self, processes, prepare, arguments):  # noqa: N802 (multiprocessing's name)
        _, seed, counts = arguments
        self._cases = draw_cases(seed, counts)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def imap_unordered(self, judge, indices, chunksize):
        for index in indices:
            yield evaluate.Outcome(self._cases[index].suite, False, 0, "{}")
