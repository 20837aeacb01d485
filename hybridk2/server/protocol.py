"""What requests of OpenAI's APIs may say: fields, types, bounds.

Owns the pydantic models and what follows from them alone, such as sampling parameters. Fields that
are not named here are ignored, as clients send many that are of no meaning to one local model.
What a message may be is the chat template's to say, which names the place of whatever is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from hybridk2.engine import Priority
    from hybridk2.sampling import SamplingParams

MAX_CHOICES = 4
MAX_TOOLS = 128
MAX_NAME = 64
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_TOKENS = 2**31 - 1

MAX_PROMPTS = 64
MAX_TOKENIZED_CHARACTERS = 2_000_000  # twice what the longest context holds of plain text

_PROMPT_COUNT = Field(min_length=1, max_length=MAX_PROMPTS)
_COMPLETION_TOKENS = 16

# How Open WebUI begins the prompts of its background tasks: titles, tags, follow-up questions.
_TASK_PROMPT = "### Task:"

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=r"^[a-zA-Z0-9_.-]+$")]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class StrictBody(BaseModel):
    """Strict: a number in quotes is text, and true is no number. NaN and Infinity are refused."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class ToolFunction(StrictBody):
    """A function that the model may call. What else it says is shown to the model as it is."""

    model_config = ConfigDict(extra="allow")

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDeclaration(StrictBody):
    """A tool in OpenAI's form."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: ToolFunction


def as_written(tools: list[ToolDeclaration] | None) -> list[dict[str, Any]] | None:
    """Tools as the client wrote them: the model reads them word by word."""
    if tools is None:
        return None
    return [tool.model_dump(exclude_unset=True) for tool in tools]


class JsonSchemaFormat(StrictBody):
    """The schema of a structured answer."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictBody):
    """What the visible answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_one_is_due(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StreamOptions(StrictBody):
    """What a stream has beside the answer."""

    include_usage: bool | None = None


class SamplingRequest(StrictBody):
    """What chat completions and completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    service_tier: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def priority(self) -> Priority:
        """Background for what no one waits for: OpenAI's flexible tier, a task in the metadata."""
        marked = self.service_tier == "flex" or (self.metadata and "task" in self.metadata)
        return "background" if marked else "interactive"

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, choice: int = 0
    ) -> SamplingParams:
        """What this asks of sampling. Several choices of one seed get seeds that follow it."""
        from hybridk2.sampling import SamplingParams  # loads torch; by now the model has

        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),  # -1: off, as in vLLM
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            seed=None if self.seed is None else self.seed + choice,
            max_tokens=max_tokens,
            stop=tuple(stop),
            logprobs=logprobs,
            logit_bias=tuple((int(key), bias) for key, bias in (self.logit_bias or {}).items()),
        )


class ChatCompletionRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[ToolDeclaration], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @field_validator("messages")
    @classmethod
    def _names_are_short(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for index, message in enumerate(messages):
            name = message.get("name")
            if isinstance(name, str) and len(name) > MAX_NAME:
                raise ValueError(f"[{index}].name: expected at most {MAX_NAME} characters")
        return messages

    @model_validator(mode="after")
    def _fits_together(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("tools: two tools have the same name")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """At most so many tokens of answer, its thought included."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def tool_dicts(self) -> list[dict[str, Any]] | None:
        return as_written(self.tools)

    @property
    def response_format_dict(self) -> dict[str, Any] | None:
        if self.response_format is None:
            return None
        return self.response_format.model_dump(exclude_unset=True, by_alias=True)

    @property
    def reported_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def priority(self) -> Priority:
        """Also background: the prompts of tasks that front ends send as requests like any other."""
        only = self.messages[0].get("content") if len(self.messages) == 1 else None
        if isinstance(only, str) and only.startswith(_TASK_PROMPT):
            return "background"
        return super().priority


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], _PROMPT_COUNT]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], _PROMPT_COUNT]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: only the same as n is possible")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 leaves nothing to answer without echo")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def answer_tokens(self) -> int:
        """At most so many tokens; OpenAI's default."""
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class TokenizeRequest(StrictBody):
    """POST /tokenize: a text, or a conversation as the model is shown it."""

    prompt: Annotated[str, Field(max_length=MAX_TOKENIZED_CHARACTERS)] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: Annotated[list[ToolDeclaration], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(StrictBody):
    """POST /detokenize."""

    tokens: list[TokenId]
