"""The server's log on standard error: lines for a person, or one JSON object a line."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from hybridk2.cli.notes import is_terminal
from hybridk2.cli.terminal_text import printable_line

_STYLES = {logging.INFO: "dim", logging.WARNING: "yellow"}


class LogLines(logging.Handler):
    """Writes records to a console, beside a loading bar if there is one."""

    def __init__(self, status: Console, as_json: bool) -> None:
        super().__init__(logging.INFO)
        self._status = status
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        line = _json_line(record) if self._as_json else _text_line(record)
        if self._as_json or not is_terminal(self._status):
            self._status.file.write(line + "\n")  # drawing it would cost as much as a request does
            self._status.file.flush()
            return
        style = _STYLES.get(record.levelno, "red")
        self._status.print(Text(line, style=style), soft_wrap=True)


def log_to(status: Console, as_json: bool) -> None:
    """Send what the program and uvicorn log to `status`, from information up."""
    handler = LogLines(status, as_json)
    for name, level in (("hybridk2", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


def _text_line(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
    line = f"{moment} {printable_line(record.getMessage())}"
    if record.exc_info:
        line += "\n" + logging.Formatter().formatException(record.exc_info)
    return line


def _json_line(record: logging.LogRecord) -> str:
    fields = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    if isinstance(record.args, dict):  # a record of figures: the access log's
        fields |= record.args
    if record.exc_info:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return json.dumps(fields, default=str)
