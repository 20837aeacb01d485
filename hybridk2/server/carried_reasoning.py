"""Reasoning that a client carries from turn to turn without showing it.

Two APIs have an opaque field for that: the signature of a thinking block in Anthropic's Messages,
encrypted_content of a reasoning item in OpenAI's Responses. This server remembers nothing between
requests, and K2 needs its reasoning back while a run of tool calls lasts, so the field holds the
reasoning itself. It is no secret from the client and is not encrypted.
"""

import base64
import binascii

_MARK = "hybridk2:"


def carry(reasoning: str) -> str:
    """The opaque text that `carried` reads back."""
    return _MARK + base64.b64encode(reasoning.encode()).decode("ascii")


def carried(opaque: str) -> str:
    """The reasoning that `carry` made this text of; "" for what another server or model made."""
    if not opaque.startswith(_MARK):
        return ""
    try:
        return base64.b64decode(opaque.removeprefix(_MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
