"""Trains K2-nano from nothing: vocabulary, conversations, network, checkpoint.

    python -m hybridk2.nano.train --out FOLDER --minutes 8.75

Everything is generated: no file is read but the table of tool kinds. Conversations are made by
worker processes while the network trains; the time budget sets the learning-rate schedule.

The checkpoint in hybridk2/nano/checkpoint was made in two sittings with torch 2.11 and 16 CPU
cores: from nothing on one NVIDIA H200, nine and a half minutes with compilation, 13,200 steps, 870
million tokens, 1.8 million tokens/s; then, after the corpus had been made harder, four minutes more
on one H100 with --continue-from, 4,840 steps, 317 million tokens. After that, values were set apart
from what follows them and one way to ask for a distance was dropped: no training has seen that yet.
The corpus is a function of the seed; the number of steps depends on the machine, so another run
gives another model of the same kind.
"""

import logging
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridk2.nano.attention_masks import PackedDocuments
from hybridk2.nano.cases import COMPARISON, TALK, TOOL_ANSWER, TOOL_CALL, draw_cases, shares_right
from hybridk2.nano.corpus import PADDING, PROMPT, TARGET, Batch, batches, training_texts
from hybridk2.nano.export import read_weights, write_weights
from hybridk2.nano.generation import replies_to
from hybridk2.nano.muon import Muon
from hybridk2.nano.network import Network, nano_config
from hybridk2.nano.vocabulary import (
    CONFIG_FILE,
    VOCABULARY_FILE,
    train_vocabulary,
    write_vocabulary,
)
from hybridk2.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BASE_VOCABULARY = 1792
VOCABULARY_CONVERSATIONS = 12_000
VALIDATION_SEED = 20_000_003

MATRIX_RATE = 0.02
VECTOR_RATE = 4e-3
# Slower, and decayed, so that the sigmoids do not saturate and the bias need not chase them.
ROUTER_RATE, ROUTER_DECAY = 1.5e-3, 0.05
WARMUP_STEPS = 60
CONSTANT_SHARE = 0.25  # of the budget; then the rates fall linearly to zero
PROMPT_WEIGHT = 0.15  # of a prompt token in the loss, at the start; falls to zero
BALANCE_STEP = 1e-3
CONTINUED_RATE = 0.5  # of the peak rates, where training goes on from a checkpoint


@dataclass(frozen=True)
class Budget:
    """How long to train: a time, or (for trials) a number of steps."""

    seconds: float
    max_steps: int | None

    def progress(self, step: int, elapsed: float) -> float:
        """0 at the start, 1 when training is over."""
        if self.max_steps is not None:
            return step / self.max_steps
        return elapsed / self.seconds


def rate_factor(step: int, progress: float) -> float:
    """Learning rate relative to its peak: warm-up, constant, linear to zero."""
    falling = (1.0 - progress) / (1.0 - CONSTANT_SHARE)
    return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, falling))


def _produce(queue: "Queue[Batch]", folder: Path, seed: int, tokens_per_step: int) -> None:
    torch.set_num_threads(1)
    for batch in batches(Tokenizer.from_folder(folder), seed, tokens_per_step):
        queue.put(batch)


@contextmanager
def batch_stream(
    folder: Path, seed: int, tokens_per_step: int, workers: int
) -> Iterator[Iterator[Batch]]:
    """Batches from worker processes, taken in turn so that their order does not depend on speed."""
    context = multiprocessing.get_context("fork")  # started before anything touches CUDA
    queues = [context.Queue(maxsize=4) for _ in range(workers)]
    processes = [
        context.Process(
            target=_produce,
            args=(queue, folder, seed * 1_000_003 + worker, tokens_per_step),
            daemon=True,
        )
        for worker, queue in enumerate(queues)
    ]
    for process in processes:
        process.start()

    def take() -> Iterator[Batch]:
        while True:
            for queue in queues:
                yield queue.get()

    try:
        yield take()
    finally:
        for process in processes:
            process.terminate()
            process.join()


class Trainer:
    """One network, its optimisers, and a step."""

    def __init__(
        self, network: Network, tokens_per_step: int, compiled: bool, peak: float = 1.0
    ) -> None:
        """peak: scales all learning rates."""
        self.network = network
        self._peak = peak
        device = network.embedding.device
        self._attend = PackedDocuments(
            tokens_per_step, network.config.softmax_scale, device, by_blocks=compiled
        )
        self._weights = torch.zeros(3, device=device)
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        routers: list[nn.Parameter] = []
        for name, parameter in network.named_parameters():
            plain = parameter.dim() < 2 or name in ("embedding", "head")
            (routers if "router" in name else vectors if plain else matrices).append(parameter)
        self._muon = Muon(matrices, MATRIX_RATE)
        self._adam = torch.optim.AdamW(
            [
                {"params": vectors, "peak": VECTOR_RATE},
                {"params": routers, "peak": ROUTER_RATE, "weight_decay": ROUTER_DECAY},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=compiled,
        )
        self._loss_of = torch.compile(_loss_of) if compiled else _loss_of
        if compiled:
            for layer in network.layers:
                layer.compile(dynamic=False)

    def step(self, batch: Batch, step: int, progress: float) -> Tensor:
        """Learn from one batch. Returns sums: loss, right tokens, target tokens."""
        device = self._weights.device
        tokens = torch.from_numpy(batch.tokens.astype("int64")).to(device, non_blocking=True)
        starts = torch.from_numpy(batch.starts).to(device, non_blocking=True)
        marks = torch.from_numpy(batch.marks.astype("int64")).to(device, non_blocking=True)
        self._weights[PROMPT] = PROMPT_WEIGHT * (1.0 - progress)
        self._weights[TARGET], self._weights[PADDING] = 1.0, 0.0
        self._attend.set_documents(starts)
        # Position i predicts token i + 1, inside one document.
        same = F.pad(starts[1:] == starts[:-1], (0, 1))
        labels, next_marks = tokens.roll(-1), marks.roll(-1)
        weights = self._weights[next_marks] * same
        positions = torch.arange(tokens.numel(), device=device) - starts
        hidden = self.network(tokens, positions, self._attend)
        targets = (next_marks == TARGET) & same
        total, sums = self._loss_of(hidden, self.network.head, labels, weights, targets)
        total.backward()
        factor = self._peak * rate_factor(step, progress)
        self._muon.rate = MATRIX_RATE * factor
        for group in self._adam.param_groups:
            group["lr"] = group["peak"] * factor
        self._muon.step()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        for mixture in self.network.mixtures():
            mixture.balance(BALANCE_STEP * max(factor, 0.1))
        return sums


def _loss_of(
    hidden: Tensor, head: nn.Parameter, labels: Tensor, weights: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    count = targets.sum().clamp(min=1)
    right = ((logits.argmax(-1) == labels) & targets).sum()
    sums = torch.stack(((losses.detach() * targets).sum(), right.float(), count.float()))
    return (losses * weights).sum() / count, sums


def _validate(network: Network, tokenizer: Tokenizer, cases: int) -> str:
    counts = {COMPARISON: cases, TOOL_CALL: cases, TOOL_ANSWER: cases // 2, TALK: cases // 2}
    drawn = draw_cases(VALIDATION_SEED, counts)
    replies = replies_to(network, tokenizer, drawn, rows=256 if network.embedding.is_cuda else 8)
    shares = shares_right(drawn, replies)
    return ", ".join(f"{suite} {share:.1%}" for suite, share in shares.items())


def _train(
    trainer: Trainer, stream: Iterator[Batch], budget: Budget, tokenizer: Tokenizer, cases: int
) -> None:
    begun = time.monotonic()
    reported, validated, seen, sums = begun, begun, 0, torch.zeros(3)
    step = 0
    while (progress := budget.progress(step, time.monotonic() - begun)) < 1.0:
        batch = next(stream)
        sums = sums.to(trainer.network.embedding.device) + trainer.step(batch, step, progress)
        step += 1
        seen += batch.tokens.size
        now = time.monotonic()
        if step in (1, 10) or now - reported > 10:
            loss, right, count = sums.tolist()
            seconds = time.monotonic() - reported
            logger.info(
                "step %d  loss %.4f  right %.3f%%  %.0f k tokens/s  %.0f%% done, %.0f s left",
                step, loss / count, 100 * right / count, seen / seconds / 1e3, 100 * progress,
                (now - begun) * (1 - progress) / max(progress, 1e-3),
            )  # fmt: skip
            reported, seen, sums = time.monotonic(), 0, torch.zeros(3)
        if now - validated > budget.seconds / 2:
            logger.info("step %d  %s", step, _validate(trainer.network, tokenizer, cases))
            validated = time.monotonic()


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", default=9.0, show_default=True, help="Time for the training steps.")
@click.option("--device", default="cuda", show_default=True, help="cuda or cpu.")
@click.option("--seed", default=1, show_default=True)
@click.option("--tokens-per-step", default=65_536, show_default=True)
@click.option("--workers", default=12, show_default=True, help="Processes that make data.")
@click.option("--steps", type=int, help="Stop after so many steps, for a trial.")
@click.option("--cases", default=100, show_default=True, help="Validation cases of each kind.")
@click.option(
    "--continue-from", "start", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Train on from this checkpoint, with its vocabulary, instead of from nothing.",
)  # fmt: skip
def main(
    out: Path, minutes: float, device: str, seed: int, tokens_per_step: int, workers: int,
    steps: int | None, cases: int, start: Path | None,
) -> None:  # fmt: skip
    """Train K2-nano and write its checkpoint into the folder OUT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out.mkdir(parents=True, exist_ok=True)
    config = nano_config(BASE_VOCABULARY)
    if start is None:
        texts = training_texts(seed, VOCABULARY_CONVERSATIONS)
        vocabulary = train_vocabulary(texts, BASE_VOCABULARY)
        write_vocabulary(out, vocabulary, config.max_position_embeddings)
    else:
        for name in (VOCABULARY_FILE, CONFIG_FILE):
            shutil.copy(start / name, out / name)
    tokenizer = Tokenizer.from_folder(out)
    logger.info("vocabulary: %d tokens", tokenizer.vocab_size)
    with batch_stream(out, seed, tokens_per_step, workers) as stream:
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("highest")  # the router must stay fp32
        network = Network(config)
        if start is not None:
            read_weights(start, network)
        network.to(device)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        logger.info("network: %.2f M parameters on %s", parameters / 1e6, device)
        peak = 1.0 if start is None else CONTINUED_RATE
        trainer = Trainer(network, tokens_per_step, compiled=device == "cuda", peak=peak)
        _train(trainer, stream, Budget(minutes * 60, steps), tokenizer, cases)
    network.eval()
    size = write_weights(out, network)
    logger.info("checkpoint: %.2f MB in %s", size / 1e6, out)
    for index, mixture in enumerate(network.mixtures()):
        spread = (mixture.bias.max() - mixture.bias.min()).item()
        logger.info(
            "MoE layer %d: the busiest expert has %.2f times the mean load, the bias spans %.2f",
            index, mixture.unevenness.item(), spread,
        )  # fmt: skip
    logger.info("validation: %s", _validate(network, tokenizer, 3 * cases))


if __name__ == "__main__":
    main()
