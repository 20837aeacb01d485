"""The ways HybridK2 refuses, as exceptions.

Every mistake a person can make (a path, a shard, a flag, a message, too little memory) raises one
of these; the command line prints it, the server turns it into an error body. A message says what,
where, found, expected, and what to do.
"""


class HybridK2Error(Exception):
    """Something outside the program is wrong, and the message says how to put it right."""


class ConfigError(HybridK2Error):
    """A model's config.json or an engine option that HybridK2 cannot run."""


class CheckpointError(HybridK2Error):
    """A checkpoint folder that is incomplete, damaged or of another model."""


class OutOfMemoryError(HybridK2Error):
    """The machine lacks the memory that was asked of it."""


class TokenizerError(HybridK2Error):
    """A vocabulary file that is missing or damaged, or an id outside the vocabulary."""


class ChatError(HybridK2Error):
    """Messages or tool declarations that cannot be rendered."""


class RequestError(HybridK2Error):
    """A sampling parameter or a request that is out of bounds."""


class ContextLengthError(RequestError):
    """A prompt that leaves no room in the context for an answer."""

    def __init__(self, prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> None:
        """max_tokens: what the request allowed its answer, None when it set no bound."""
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and the context holds {context_tokens}, "
            "with one at least for the answer. Shorten the conversation or raise the context"
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_tokens = context_tokens


class QueueFullError(RequestError):
    """As many requests run and wait as may; one more has to come again later."""


class ReplyError(HybridK2Error):
    """A reply that its request does not allow; the model may write another when asked again."""


class EngineError(HybridK2Error):
    """A step of the engine failed; the request it served is lost, the engine is not."""


class DriverError(EngineError, RuntimeError):
    """The NVIDIA driver is not there, lacks a call or refused one. A RuntimeError as torch's own
    are, so that what answers those, such as a step that cannot be recorded, answers this too."""


class DeadlineError(EngineError):
    """A request that was not finished in the time it was given."""


class TuningError(HybridK2Error):
    """A workload, a routing trace or a placement file that cannot be used."""


class SessionError(HybridK2Error):
    """A conversation file that cannot be read or written."""
