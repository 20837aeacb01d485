"""JSON values held to a schema, one token at a time.

Owns the grammar library: schema to grammar, grammar to token masks, and the rule that ends a value
within its budget. Does not know tool calls or phases of a reply (constraints.py).

The rule. Left alone, a model may be in the middle of a string when its last token comes. So a value
knows a short completion of itself (completion.py), and from the schema how much longer one token
can make it (schemas.py). Tokens are free while, whatever comes next, the completion would still fit
into the tokens that are left; from then on the completion is written. A budget that holds the
completion of the empty value therefore holds the whole value, and a larger one leaves all but its
end free. What one token can add is an estimate; should a schema defeat it, the value may be cut off
as without the rule, and is valid up to there.

A strict schema is held as it is, or refused. Of another, what no grammar holds is left out and
checked once the value is whole (value_check.py). The branches of a `oneOf` are held as those of an
`anyOf` where they exclude each other, which is the same; where they do not, that only one applies
is such a thing to check.

Departures from JSON Schema: properties come in the order of the schema; a name that is not declared
may come twice.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from hybridk2.chat.completion import CompletionSearch, Position
from hybridk2.chat.schemas import (
    GrowthEstimate,
    Schema,
    completion_hints,
    counts_undeclared_keys,
    schema_text,
    subschemas,
)
from hybridk2.chat.value_check import ValueCheck, leave_out
from hybridk2.errors import RequestError
from hybridk2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Mask = NDArray[np.bool_]

# White space as models write it: none, one space, or a line break and its indentation. Bounded, so
# that a value cannot consist of it.
#
# No `\u` escapes: in a name that is not declared the grammar allows any of them, and so a second
# spelling of a name that is. Text itself needs none.
_GRAMMAR_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"\x20|\n(\x20{0,40}|\t{0,10})",
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": True,
    "lenient": False,
}
# The beginning of what the library says, where branches of a oneOf may not exclude each other.
_OVERLAPPING = "oneOf constraints are not supported"
# A pattern that needs more states than this (about 2 kB each) is refused, while it is compiled or
# while it is written. Schemas in use need some hundred.
_MAX_LEXER_STATES = 20_000
# Of a search. A property takes about four; one takes 20 to 50 us on K2's vocabulary.
_MAX_SEARCH_STEPS = 10_000
# Of the search for a text of one pattern, where none was found by reading it. A step takes 1 ms in
# a pattern of thousands of states, and the texts of patterns in use have some ten characters.
_MAX_STRING_STEPS = 500
_MAX_COMPLETION_TOKENS = 8_192
_CACHED_SCHEMAS = 256
_NO_VALUE = "no short value was found that is valid under it; simplify it."


class JsonSchema:
    """A compiled schema. Values of it are begun, each on its own."""

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: _Vocabulary,
        search: CompletionSearch,
        characters: int,
        completion_tokens: int,
        growth_tokens: int,
        check: ValueCheck | None,
    ) -> None:
        """matcher: of a value that is not begun. characters: of the schema as JSON.
        completion_tokens: of a short value. growth_tokens: how much longer a completion may be
        after one token than before it. check: of a whole value, None where nothing was left out.
        """
        self.matcher = matcher
        self.vocabulary = vocabulary
        self.characters = characters
        self.completion_tokens = completion_tokens
        self.growth_tokens = growth_tokens
        self.check = check
        self._search = search

    def begin(self) -> JsonValue:
        return JsonValue(self)

    def complete(self, matcher: LLMatcher, position: Position) -> bytes | None:
        """A short end of a value half written; None when none was found."""
        return self._search.find(matcher, position, _MAX_SEARCH_STEPS)


class JsonValue:
    """One value while it is written. Not thread-safe."""

    def __init__(self, schema: JsonSchema) -> None:
        self._schema = schema
        self._matcher = schema.matcher.deep_copy()
        self._vocabulary = schema.vocabulary
        self._position = Position()
        self._text = bytearray()
        # However the tokens since the last search went, a completion takes no more than this.
        self._completion_bound = schema.completion_tokens
        self._completion = b""  # the one found last
        self._can_complete = True
        self._ending: list[int] | None = None  # the completion, once it has to be written

    def mask(self, tokens_left: int) -> tuple[Mask, bool]:
        """(vocab_size,) what may come next, and whether the value may end instead.

        tokens_left: how many tokens may still come, not counting what follows the value. Raises
        RequestError when the schema proves too complex while it is being written.
        """
        self._watch_budget(tokens_left)
        if self._ending is not None:
            mask = np.zeros(self._vocabulary.size, dtype=np.bool_)
            mask[self._ending[:1]] = True
            return mask, not self._ending
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(packed, bitorder="little", count=self._vocabulary.size).view(np.bool_)
        may_end = bool(mask[self._vocabulary.end_id])
        mask[self._vocabulary.end_id] = False
        return mask, may_end

    def accept(self, token_id: int) -> None:
        """A token of the mask was written."""
        if not self._matcher.consume_token(token_id):
            self._check()
        text = self._vocabulary.tokenizer.token_bytes(token_id)
        self._text += text
        for byte in text:
            self._position = self._position.after(byte)
        if self._ending is not None:
            del self._ending[0]
        self._completion_bound += self._schema.growth_tokens

    def end(self, where: str) -> None:
        """The value ended, where the mask said that it may. Raises ReplyError, naming `where`, when
        it breaks what could not be held while it was written."""
        if self._schema.check is not None:
            self._schema.check.require(bytes(self._text), where)

    def completion(self) -> list[int] | None:
        """Few tokens that would complete the value from here; None when no short end is found."""
        text = self._schema.complete(self._matcher, self._position)
        return None if text is None else self._vocabulary.tokens(text)

    def _watch_budget(self, tokens_left: int) -> None:
        """Switch to the completion when one more free token could make it too long."""
        if self._ending is not None or not self._can_complete:
            return
        longest = tokens_left - 1 - self._schema.growth_tokens
        if self._completion_bound <= longest:
            return
        self._completion = self._end_of_last_completion()
        tokens = self._vocabulary.tokens(self._completion)
        if not tokens or len(tokens) > longest:
            completion = self._schema.complete(self._matcher, self._position)
            if completion is None:
                # Something was begun that has no short end; it will have none later either.
                self._can_complete = False
                return
            self._completion = completion
            tokens = self._vocabulary.tokens(completion)
        self._completion_bound = len(tokens)
        if len(tokens) > longest:
            self._ending = tokens

    def _end_of_last_completion(self) -> bytes:
        """What of the last completion still completes the value: mostly all but what was written.

        b"" when nothing does; then it takes a search, which costs a hundred times as much.
        """
        ids = self._vocabulary.byte_tokens(self._completion)
        ids.append(self._vocabulary.end_id)
        for start in range(len(self._completion)):
            if self._matcher.validate_tokens(ids[start:]) == len(ids) - start:
                return self._completion[start:]
        return b""

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                "the schema became too complex to be held while a value of it was written; "
                "simplify its patterns."
            )


class SchemaCompiler:
    """Compiles schemas for one vocabulary, and keeps those used last.

    Building it takes about half a second on K2's vocabulary. One thread at a time may compile;
    values that were begun may be written in another.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = _Vocabulary(tokenizer)
        self._compiled: OrderedDict[tuple[str, bool], JsonSchema] = OrderedDict()

    def compile(self, schema: Schema, where: str, *, strict: bool) -> JsonSchema:
        """strict: whether all of it must be held while a value is written. Raises RequestError,
        naming `where` and the reason, for a schema that cannot be held, or then checked."""
        key = (schema_text(schema, where), strict)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(*key, where)
            if len(self._compiled) > _CACHED_SCHEMAS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return compiled

    def _compile(self, text: str, strict: bool, where: str) -> JsonSchema:
        schema = json.loads(text)
        if strict:
            self._refuse_what_seems_held(schema, where)
            check = None
        else:
            left_out = leave_out(schema)
            if self._has_overlapping_branches(schema):
                left_out.append("oneOf")
            check = ValueCheck(json.loads(text), left_out, where) if left_out else None
        matcher = self._matcher(json.dumps(schema, ensure_ascii=False), where)
        growth = GrowthEstimate(
            schema,
            self._vocabulary.count_tokens,
            lambda node: self._string_tokens(node, where),
        )
        if growth.shortest_value > _MAX_COMPLETION_TOKENS:
            raise RequestError(
                f"{where}: its shortest value has more than {_MAX_COMPLETION_TOKENS:,} tokens "
                "or, requiring itself, no end; lower its bounds."
            )
        search = self._search(schema)
        completion = search.find(matcher, Position(), _MAX_SEARCH_STEPS)
        if completion is None:
            raise RequestError(f"{where}: {_NO_VALUE}")
        completion_tokens = len(self._vocabulary.tokens(completion))
        return JsonSchema(
            matcher, self._vocabulary, search, len(text), completion_tokens, growth.tokens, check
        )

    def _refuse_what_seems_held(self, schema: dict[str, Any], where: str) -> None:
        """Raises RequestError for what the grammar takes and does not wholly hold."""
        if any(map(counts_undeclared_keys, subschemas(schema))):
            raise RequestError(
                f"{where}: minProperties cannot be held beyond one more than what is required; "
                "name the properties in `required`."
            )
        if self._has_overlapping_branches(schema):
            raise RequestError(
                f"{where}: a oneOf can only be held where its branches exclude each other, by a "
                "type, or by a constant of a required property; write anyOf."
            )

    def _has_overlapping_branches(self, schema: dict[str, Any]) -> bool:
        """Whether a value may fit several branches of a oneOf, as far as the library can tell."""
        if not any("oneOf" in node for node in subschemas(schema)):
            return False
        text = json.dumps(schema, ensure_ascii=False)
        try:
            matcher = self._vocabulary.matcher(text, {**_GRAMMAR_OPTIONS, "coerce_one_of": False})
        except ValueError:
            return False  # will be refused for that
        return matcher.is_error() and matcher.get_error().startswith(_OVERLAPPING)

    def _search(self, schema: dict[str, Any]) -> CompletionSearch:
        return CompletionSearch(self._vocabulary.byte_ids, completion_hints(schema))

    def _string_tokens(self, node: dict[str, Any], where: str) -> int:
        """Tokens of a short string under the pattern and the format of a schema."""
        schema: dict[str, Any] = {"type": "string"}
        schema.update((key, node[key]) for key in ("pattern", "format") if key in node)
        matcher = self._matcher(json.dumps(schema), where)
        completion = self._search(schema).find(matcher, Position(), _MAX_STRING_STEPS)
        if completion is None:
            raise RequestError(f"{where}: a pattern or a format: {_NO_VALUE}")
        return len(self._vocabulary.tokens(completion))

    def _matcher(self, text: str, where: str) -> LLMatcher:
        try:
            matcher = self._vocabulary.matcher(text, _GRAMMAR_OPTIONS)
        except ValueError as error:
            raise RequestError(f"{where}: {_reason(str(error))}") from error
        matcher.compute_bitmask()  # some limits show only now
        if matcher.is_error():
            raise RequestError(f"{where}: {_reason(matcher.get_error())}")
        return matcher


def _reason(message: str) -> str:
    """What the grammar library has against a schema, in a line; of a pattern's error, its end."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    line = lines[-1] if lines[0].startswith("regex parse error") else lines[0]
    return f"this schema cannot be held: {line[:200]}."


class _Vocabulary:
    """A tokenizer as the grammar library and the search see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.end_id = tokenizer.control.im_end
        singles = {
            token: token_id
            for token_id in range(tokenizer.base_size)
            if len(token := tokenizer.token_bytes(token_id)) == 1
        }
        self.byte_ids = [singles[bytes([byte])] for byte in range(256)]
        self._grammar_tokenizer = LLTokenizer(
            TokenizerWrapper(_GrammarVocabulary(tokenizer)),
            n_vocab=self.size,
            eos_token=self.end_id,
        )

    def matcher(self, schema_text: str, options: JsonCompileOptions) -> LLMatcher:
        """Of values under a schema. Raises ValueError for some that the library cannot hold; others
        show in `is_error`."""
        grammar = LLMatcher.grammar_from_json_schema(schema_text, overrides=options)
        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        return LLMatcher(self._grammar_tokenizer, grammar, log_level=0, limits=limits)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def byte_tokens(self, text: bytes) -> list[int]:
        """The text in tokens of one byte."""
        return [self.byte_ids[byte] for byte in text]

    def tokens(self, text: bytes) -> list[int]:
        """The text as the tokenizer cuts it, after the rest of a character that was begun."""
        start = 0
        while start < len(text) and text[start] & 0xC0 == 0x80:
            start += 1
        return self.byte_tokens(text[:start]) + self.tokenizer.encode(text[start:].decode())


class _GrammarVocabulary:
    """What TokenizerWrapper asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.control.im_end
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = [
            token_id
            for token_id in range(tokenizer.base_size, tokenizer.vocab_size)
            if tokenizer.control_name(token_id) is not None
        ]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))
