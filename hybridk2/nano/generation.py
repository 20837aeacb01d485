"""Greedy replies of the network under training, many prompts at once.

Plain and independent of the engine: un-absorbed attention over a padded cache. Serves to watch
training; what counts in the end is evaluate.py, which asks the engine.
"""

from collections.abc import Sequence

import torch

from hybridk2.chat.template import render
from hybridk2.nano.attention_masks import CachedRows
from hybridk2.nano.cases import Case, Reply
from hybridk2.nano.network import Network
from hybridk2.tokenizer import Tokenizer


def parse_reply(ids: Sequence[int], tokenizer: Tokenizer) -> Reply:
    """A finished reply's tokens as text and calls; malformed ones come out as wrong ones."""
    control = tokenizer.control
    ended = control.im_end in ids
    body = list(ids[: ids.index(control.im_end)]) if ended else list(ids)
    if control.end_think in body:
        body = body[body.index(control.end_think) + 1 :]
    if control.tool_calls_section_begin not in body:
        return Reply(tokenizer.decode(body), (), ended)
    begin = body.index(control.tool_calls_section_begin)
    calls = []
    for part in _split(body[begin + 1 :], control.tool_call_begin)[1:]:
        pieces = _split(part, control.tool_call_argument_begin)
        call_id = tokenizer.decode(pieces[0])
        arguments = _split(pieces[1], control.tool_call_end)[0] if len(pieces) == 2 else []
        name = call_id.removeprefix("functions.").rpartition(":")[0]
        calls.append((call_id, name, tokenizer.decode(arguments)))
    return Reply(tokenizer.decode(body[:begin]), tuple(calls), ended)


def _split(ids: Sequence[int], at: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token_id in ids:
        if token_id == at:
            parts.append([])
        else:
            parts[-1].append(token_id)
    return parts


@torch.inference_mode()
def generate(
    network: Network, prompts: Sequence[Sequence[int]], max_new: int, pad: int, stop: int
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and including `stop`."""
    device = network.embedding.device
    longest = max(len(prompt) for prompt in prompts)
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    attend = CachedRows(padding, longest + max_new, network.config.softmax_scale)
    positions = (torch.arange(longest, device=device) - padding[:, None]).clamp(min=0)
    replies: list[torch.Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new):
        attend.extend(tokens.shape[1])
        hidden = network(tokens.flatten(), positions.flatten(), attend)
        last = hidden.unflatten(0, (len(prompts), -1))[:, -1]
        tokens = network.logits(last).argmax(-1, keepdim=True)
        positions = positions[:, -1:] + 1
        replies.append(tokens[:, 0])
        done |= tokens[:, 0] == stop
        if step % 16 == 15 and bool(done.all()):
            break
    answers = torch.stack(replies, 1).tolist()
    return [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in answers]


def replies_to(
    network: Network, tokenizer: Tokenizer, cases: Sequence[Case], rows: int, max_new: int = 448
) -> list[Reply]:
    """The network's replies, in the order of the cases; `rows` prompts are run at once."""
    control = tokenizer.control
    prompts = [render(case.messages, case.talk.tools, tokenizer) for case in cases]
    order = sorted(range(len(cases)), key=lambda index: len(prompts[index]))
    replies: list[Reply | None] = [None] * len(cases)
    network.eval()
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        answers = generate(
            network, [prompts[index] for index in chosen], max_new, control.pad, control.im_end
        )
        for index, answer in zip(chosen, answers, strict=True):
            replies[index] = parse_reply(answer, tokenizer)
    network.train()
    return [reply for reply in replies if reply is not None]
