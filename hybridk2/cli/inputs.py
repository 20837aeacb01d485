"""Files that the person names: documents to talk about, declarations of tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridk2.cli.terminal_text import printable_line
from hybridk2.errors import ChatError, RequestError


def read_document(path: Path) -> str:
    """A text file's content. Raises RequestError when it cannot be read or is not UTF-8 text."""
    shown = printable_line(str(path))
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{shown}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{shown}: byte {error.start} is not UTF-8; only text files can be read to the model"
        ) from error


def document_block(name: str, text: str) -> str:
    """The document as it stands in a message, marked where it begins and ends."""
    return f"--- {name} ---\n{text.rstrip()}\n--- end of {name} ---"


def with_documents(question: str, blocks: list[str]) -> str:
    """One message of documents and a question. The question comes last, where the answer begins."""
    return "\n\n".join([*blocks, question])


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Tool declarations in OpenAI's form: a JSON list of {"type": "function", "function": {...}}.

    Raises ChatError when the file is not that.
    """
    shown = printable_line(str(path))
    try:
        tools = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ChatError(f"{shown}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{shown}: not valid JSON: {error}") from error
    if not isinstance(tools, list) or not tools:
        raise ChatError(f"{shown}: expected a list of tools, found {type(tools).__name__}")
    for position, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or tool.get("type") != "function":
            raise ChatError(
                f"{shown}: tool {position}: expected "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
    return tools
