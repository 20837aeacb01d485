"""What do the approximate modes do to the answers?

The exact model answers K2-nano's held-out questions, greedily. Its answers are then decoded once
more, token by token, in each mode: 0, 1, 2, ... of each token's experts deferred by a layer,
latents in fp8, matrices in int8. After every token the distribution is compared with the exact one:
Kullback-Leibler divergence of it from the exact one in nats, and how often the likeliest token is
another. Prompts are read in the same mode; deferral does not concern them. Without a card int8
products of few rows are torch's in fp32: as exact as the kernel's.

The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridk2.chat.template import render
from hybridk2.checkpoint import Checkpoint, locate_model
from hybridk2.config import DeviceName
from hybridk2.device import Device, select_device
from hybridk2.experts.host import HostExperts
from hybridk2.experts.loading import load_experts
from hybridk2.experts.router import ThreadRouter
from hybridk2.kv_cache import CacheSequence, PagedLatentCache
from hybridk2.model.k2 import K2Model
from hybridk2.model.layers import DECODE_ROWS
from hybridk2.model.loading import fp8_latents, load_model, paged_mix_for
from hybridk2.model.moe import RoutedExperts
from hybridk2.model.triton import few_rows
from hybridk2.nano.cases import SUITES, draw_cases
from hybridk2.tokenizer import Tokenizer

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Mode:
    """What is approximate: nothing, unless said so. deferred: experts of each decoded token."""

    name: str
    deferred: int = 0
    fp8: bool = False
    int8: bool = False


@dataclass
class Answer:
    """A prompt, what the exact model answered, and its logits (tokens, vocab) after each token of
    the answer, which decoding computed."""

    prompt: list[int]
    tokens: list[int]
    logits: list[Tensor]


@click.command()
@click.option("--cases", default=24, show_default=True, help="Questions of each kind.")
@click.option("--max-tokens", default=200, show_default=True, help="Of an answer.")
@click.option("--seed", default=7, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@torch.inference_mode()
def main(cases: int, max_tokens: int, seed: int, device: DeviceName) -> None:
    """Compare K2-nano in every approximate mode to K2-nano as it is."""
    where = select_device(device)
    if not where.has_kernels:
        few_rows.product = product_on_host
    folder = locate_model("nano")
    tokenizer = Tokenizer.from_folder(folder)
    drawn = draw_cases(seed, dict.fromkeys(SUITES, cases))
    prompts = [list(render(case.messages, case.talk.tools, tokenizer)) for case in drawn]
    rows = []
    with Checkpoint.open(folder) as checkpoint, experts_of(checkpoint) as experts:
        ends = set(checkpoint.eos_token_ids)
        exact = side(checkpoint, experts, where, Mode("exact"))
        answers: list[Answer] = []
        for first in range(0, len(prompts), DECODE_ROWS):
            answers += answer(*exact, prompts[first : first + DECODE_ROWS], ends, max_tokens)
        tokens = sum(len(one.logits) for one in answers)
        print(
            f"{len(answers)} answers, {tokens} decoded tokens, "
            f"{experts.isa}, {experts.threads} threads, {where.name}"
        )
        print("mode                KL mean    KL median  KL 99%     other likeliest token")
        for mode in modes(checkpoint.config.num_experts_per_tok):
            divergences, changed = compare(*side(checkpoint, experts, where, mode), answers)
            row = {
                "mode": mode.name,
                "kl_mean": divergences.mean().item(),
                "kl_median": divergences.median().item(),
                "kl_99": divergences.quantile(0.99).item(),
                "other_likeliest": changed / tokens,
            }
            rows.append(row)
            print(
                f"{mode.name:18}  {row['kl_mean']:.2e}   {row['kl_median']:.2e}   "
                f"{row['kl_99']:.2e}   {row['other_likeliest']:.3%}",
                flush=True,
            )
    about = {"bench": "approximations", "device": where.name, "answers": len(answers)}
    print(json.dumps(about | {"tokens": tokens, "rows": rows}))


def modes(top_k: int) -> list[Mode]:
    """None of them first: what is seen there is noise."""
    found = [Mode(f"{deferred} of {top_k} deferred", deferred) for deferred in range(top_k + 1)]
    return [*found, Mode("latents in fp8", fp8=True), Mode("matrices in int8", int8=True)]


def product_on_host(
    x: Tensor, codes: Tensor, scales: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """few_rows.product by torch. Codes times scales have 16 significant bits: fp32 holds them."""
    weight = codes.float()
    if scales is not None:
        weight = (weight.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
    return F.linear(x.float(), weight[:, : x.shape[1]]).to(out_dtype)


def experts_of(checkpoint: Checkpoint) -> HostExperts:
    experts = HostExperts.of_model(checkpoint.config)
    load_experts(checkpoint, experts, lambda progress: None)
    return experts


def side(
    checkpoint: Checkpoint, experts: HostExperts, device: Device, mode: Mode
) -> tuple[K2Model, PagedLatentCache]:
    config = checkpoint.config
    routed = RoutedExperts(ThreadRouter(experts, device), deferred=mode.deferred)
    model = load_model(
        checkpoint,
        experts,
        device,
        torch.bfloat16,
        routed=routed,
        paged_mix=paged_mix_for(config, device),
        int8=mode.int8,
    )
    latents = fp8_latents(config) if mode.fp8 else None
    cache = PagedLatentCache(config, 1 << 15, CHUNK_TOKENS, device, torch.bfloat16, latents)
    return model, cache


def read(
    model: K2Model, cache: PagedLatentCache, prompt: Sequence[int]
) -> tuple[CacheSequence, Tensor]:
    """The sequence after a prompt that nothing is reused of, and the logits (vocab,)."""
    sequence = cache.open([], repeatable=True)
    for first in range(0, len(prompt), CHUNK_TOKENS):
        ids = prompt[first : first + CHUNK_TOKENS]
        sequence.reserve(len(ids))
        positions = torch.arange(first, first + len(ids))
        hidden = model.forward(torch.tensor(ids), positions, sequence)
    return sequence, model.logits(hidden[-1:])[0].cpu()


def decode(model: K2Model, sequences: Sequence[CacheSequence], tokens: Sequence[int]) -> Tensor:
    """Logits (sequences, vocab) after one more token of each."""
    for sequence in sequences:
        sequence.reserve(1)
    logits = model.decode(tokens, sequences, rows_are_independent=True).clone()
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.advance([token])
    return logits


def answer(
    model: K2Model,
    cache: PagedLatentCache,
    prompts: Sequence[list[int]],
    ends: set[int],
    max_tokens: int,
) -> list[Answer]:
    """Greedy answers, side by side, each up to its end."""
    answers, sequences = [], []
    for prompt in prompts:
        sequence, logits = read(model, cache, prompt)
        answers.append(Answer(prompt, [int(logits.argmax())], []))
        sequences.append(sequence)
    running = list(range(len(prompts)))
    while running:
        last = [answers[index].tokens[-1] for index in running]
        logits = decode(model, [sequences[index] for index in running], last)
        for row, index in enumerate(running):
            answers[index].logits.append(logits[row])
            answers[index].tokens.append(int(logits[row].argmax()))
        running = [
            index
            for index in running
            if answers[index].tokens[-1] not in ends and len(answers[index].tokens) < max_tokens
        ]
    for sequence in sequences:
        sequence.close()
    return answers


def compare(
    model: K2Model, cache: PagedLatentCache, answers: Sequence[Answer]
) -> tuple[Tensor, int]:
    """Divergences after each token of the answers, and how many likeliest tokens are others."""
    divergences, changed = [], 0
    for first in range(0, len(answers), DECODE_ROWS):
        group = answers[first : first + DECODE_ROWS]
        sequences = [read(model, cache, one.prompt)[0] for one in group]
        for step in range(max(len(one.logits) for one in group)):
            running = [index for index, one in enumerate(group) if step < len(one.logits)]
            tokens = [group[index].tokens[step] for index in running]
            found = decode(model, [sequences[index] for index in running], tokens)
            wanted = torch.stack([group[index].logits[step] for index in running])
            exact, other = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
            divergences.append((exact.exp() * (exact - other)).sum(-1))
            changed += int((wanted.argmax(-1) != found.argmax(-1)).sum())
        for sequence in sequences:
            sequence.close()
    return torch.cat(divergences), changed


if __name__ == "__main__":
    main()
