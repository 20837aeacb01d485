"""A short way to end a JSON value that is half written.

Owns the search for bytes that complete a value under its grammar, and the position within JSON that
steers it. Not the shortest way, but near it, and found in a few steps: prefer what closes, pass by
what is optional, and in a string that may not end yet look for the character that brings progress.
Does not know tokens beyond those of single bytes, nor budgets (json_values.py).
"""

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from hybridk2.chat.schemas import CompletionHints

# What a number, a literal or another value goes on with: short ones first, white space never.
_VALUE_BYTES = b'0123456789"-.tfnrualse+eE[{'
_DIGITS = frozenset(b"0123456789")

# Costs that order the search, against that of an open bracket, which is 1. Brackets are cheap: what
# is required has to be opened, and with dear ones every combination of the choices before it would
# be tried first. They are not free: in a recursive schema the way out is a choice at some bracket.
_CHOICE = 8  # for each better one there was
_OPTIONAL_NAME = 16  # a property nobody requires
# Where a name may go on with more bytes than this, it is no declared one.
_MAX_NAME_BRANCHES = 56


class Position(NamedTuple):
    """Where in a JSON text its next byte stands."""

    brackets: bytes = b""  # those still open
    members: tuple[bytes, ...] = (b"",)  # for the value and each bracket: the property it is under
    in_string: bool = False
    escaped: bool = False  # after a backslash
    expects_name: bool = False  # the next string, or the one at hand, names a property
    name: bytes = b""  # what is written of it, or the last one
    length: int = 0  # characters of the string at hand

    def after(self, byte: int) -> "Position":
        """The position behind one more byte of valid JSON."""
        if self.in_string:
            if byte == ord('"') and not self.escaped:
                return self._replace(in_string=False, length=0)
            return self._replace(
                escaped=byte == ord("\\") and not self.escaped,
                name=self.name + bytes([byte]) if self.expects_name else self.name,
                # The second byte of an escape and those that continue a character do not count.
                length=self.length + (byte & 0xC0 != 0x80 and not self.escaped),
            )
        if byte == ord('"'):
            return self._replace(in_string=True, name=b"" if self.expects_name else self.name)
        if byte in b"{[":
            # An item is under the property that its array is under.
            member = self.name if self.brackets.endswith(b"{") else self.members[-1]
            members = (*self.members, member)
            return Position(self.brackets + bytes([byte]), members, expects_name=byte == ord("{"))
        if byte in b"}]":
            return Position(self.brackets[:-1], self.members[:-1])
        if byte == ord(","):
            return self._replace(expects_name=self.brackets.endswith(b"{"))
        if byte == ord(":"):
            return self._replace(expects_name=False)
        return self


@dataclass(order=True, slots=True)
class _Node:
    """A continuation of the value. The cheapest is looked at first, of equals the latest."""

    cost: int
    order: int
    matcher: LLMatcher = field(compare=False)
    position: Position = field(compare=False)
    text: bytes = field(compare=False)
    penalty: int = field(compare=False)
    mask: bytes = field(compare=False)  # of the node before, to see whether there is progress
    standstill: int = field(compare=False)  # how many bytes long there was none


class CompletionSearch:
    """Finds completions under one schema."""

    def __init__(self, byte_ids: Sequence[int], hints: CompletionHints) -> None:
        """byte_ids: the token of each single byte. hints: tried, not trusted."""
        self._byte_ids = np.array(byte_ids)
        self._required = {
            member.encode(): tuple(name.encode() for name in names)
            for member, names in hints.required_under.items()
        }
        self._least_lengths = sorted(hints.least_lengths)
        escaped = (json.dumps(text, ensure_ascii=False)[1:-1].encode() for text in hints.examples)
        # Whatever was written, the end of an example may be what is missing.
        ends = {text[start:] for text in escaped for start in range(len(text))}
        self._string_ends = sorted(ends, key=lambda text: (len(text), text))

    def find(self, matcher: LLMatcher, position: Position, max_steps: int) -> bytes | None:
        """Bytes that complete the value `matcher` has read; it is not moved.

        None when none was found within max_steps continuations.
        """
        order = steps = 0
        heap = [_Node(0, 0, matcher.deep_copy(), position, b"", 0, b"", 0)]
        while heap and steps < max_steps:
            node = heapq.heappop(heap)
            self._take_forced_bytes(node)
            if node.matcher.is_accepting():
                return node.text
            children = self._children(node)
            steps += len(children)
            for rank, child in reversed(list(enumerate(children))):
                order -= 1  # the best is pushed last, and comes first among equals
                child.order = order
                child.penalty += _CHOICE * rank
                child.cost = len(child.position.brackets) + child.penalty
                heapq.heappush(heap, child)
        return None

    def _take_forced_bytes(self, node: _Node) -> None:
        while forced := node.matcher.compute_ff_bytes():
            for byte in forced:
                if not node.matcher.consume_token(int(self._byte_ids[byte])):
                    return
                node.position = node.position.after(byte)
            node.text += forced

    def _children(self, node: _Node) -> list[_Node]:
        """One byte, or the rest of a string, further; best first."""
        mask = node.matcher.compute_bitmask()
        if node.matcher.is_error():
            return []
        node.standstill = node.standstill + 1 if mask == node.mask else 0
        allowed = self._allowed_bytes(mask)
        if text := self._string_end(node, allowed):
            return [self._child(node, text, mask)]
        children: list[_Node] = []
        without_progress: list[_Node] = []
        seen: set[bytes] = set()
        for byte, penalty in self._candidates(node, allowed):
            child = self._child(node, bytes([byte]), mask, penalty)
            # In numbers and strings two bytes that allow the same afterwards are as good as one.
            if not node.position.expects_name and (node.position.in_string or byte in _DIGITS):
                child_mask = child.matcher.compute_bitmask()
                if child_mask in seen:
                    continue
                seen.add(child_mask)
                if child_mask == mask:
                    without_progress.append(child)
                    continue
            children.append(child)
        return children + without_progress

    def _child(self, node: _Node, text: bytes, mask: bytes, penalty: int = 0) -> _Node:
        matcher = node.matcher.deep_copy()
        matcher.consume_tokens(self._byte_ids[list(text)].tolist())
        position = node.position
        for byte in text:
            position = position.after(byte)
        penalty += node.penalty
        return _Node(0, 0, matcher, position, node.text + text, penalty, mask, node.standstill)

    def _string_end(self, node: _Node, allowed: bytes) -> bytes:
        """A few characters, or the shortest end of an example, after which the string at hand may
        close; b"" if there are none."""
        position = node.position
        if not position.in_string or position.expects_name or position.escaped or 0x22 in allowed:
            return b""
        fillings = (b"a" * (least - position.length) for least in self._least_lengths)
        for text in (*filter(None, fillings), *self._string_ends):
            ids = self._byte_ids[list(text + b'"')].tolist()
            if text[0] in allowed and node.matcher.validate_tokens(ids) == len(ids):
                return text
        return b""

    def _allowed_bytes(self, mask: bytes) -> bytes:
        packed: NDArray[np.uint8] = np.frombuffer(mask, np.uint8)
        bits = packed[self._byte_ids >> 3] >> (self._byte_ids & 7) & 1
        return bits.astype(np.uint8).nonzero()[0].astype(np.uint8).tobytes()

    def _candidates(self, node: _Node, allowed: bytes) -> list[tuple[int, int]]:
        """(byte, penalty) to try next, best first."""
        position = node.position
        if position.in_string and position.expects_name and not position.escaped:
            return self._name_candidates(position, allowed)
        if position.in_string:
            return [(byte, 0) for byte in self._string_candidates(node, allowed)]
        for closing in b"}],:":
            if closing in allowed:
                return [(closing, 0)]
        visible = [byte for byte in _VALUE_BYTES if byte in allowed]
        return [(byte, 0) for byte in visible or allowed]

    def _name_candidates(self, position: Position, allowed: bytes) -> list[tuple[int, int]]:
        """Letters of required names first, then the end of the name, then the rest."""
        name = position.name
        needed = {
            full[len(name)]
            for full in self._required.get(position.members[-1], ())
            if len(full) > len(name) and full.startswith(name)
        }
        needed.add(ord('"'))
        first = [(byte, 0) for byte in allowed if byte in needed]
        others = [byte for byte in allowed if byte not in needed and byte != ord("\\")]
        if len(others) > _MAX_NAME_BRANCHES:
            # Free text, where one letter is as good as another; or within a character of it.
            others = [byte for byte in others if chr(byte).isalnum()][:1] or others[:1]
        return first + [(byte, _OPTIONAL_NAME) for byte in others]

    def _string_candidates(self, node: _Node, allowed: bytes) -> list[int]:
        """The closing quote; where it is not allowed, one byte of each kind there is.

        Most strings only want length: then all bytes are alike, and one is tried. Others are looked
        at when nothing changed for 0, 1, 2, 4, 8, ... bytes: a pattern waits for one of them.
        """
        if ord('"') in allowed and not node.position.escaped:
            return [ord('"')]
        ascii_bytes = [byte for byte in allowed if byte < 0x80 and byte != ord("\\")]
        if not ascii_bytes:
            return list(allowed[:1])
        letters = [byte for byte in ascii_bytes if chr(byte).isalnum()]
        if node.standstill & (node.standstill - 1):
            return letters[:1] or ascii_bytes[:1]
        kinds = [[b for b in letters if kind(chr(b))] for kind in (str.islower, str.isupper)]
        kinds.append([byte for byte in letters if byte in _DIGITS])
        picked = [b for kind in kinds for b in (kind if len(kind) <= 6 else (kind[0], kind[-1]))]
        return picked + [byte for byte in ascii_bytes if byte not in letters]
