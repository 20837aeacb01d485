"""What `hybridk2 serve` says while it starts: where it listens, how far loading is, how to ask."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from hybridk2.cli.loading import figures, show_progress
from hybridk2.cli.notes import note
from hybridk2.cli.terminal_text import printable, printable_line

if TYPE_CHECKING:
    from hybridk2.checkpoint import LoadProgress

logger = logging.getLogger(__name__)

_QUESTION = "which one is bigger, 9.11 or 9.9?"


class Announcements:
    """Lines and a bar for a person; where the log is JSON, records of the log."""

    def __init__(self, status: Console, as_records: bool, url: str, model: str, key: bool) -> None:
        """key: whether clients need one."""
        self._status = status
        self._as_records = as_records
        self._url = url
        self._model = model
        self._key = key

    def listening(self) -> None:
        self._say(f"{self._url} listens; the model is being loaded")

    def loading(self, moments: Iterable[LoadProgress]) -> None:
        """Show how far it is, until nothing more comes."""
        if not self._as_records:
            show_progress(moments, self._status)
            return
        for progress in moments:
            if progress.done_bytes >= progress.total_bytes:
                stage = printable_line(progress.stage)
                logger.info("%s: %s, %.1f s", stage, figures(progress), progress.seconds)

    def ready(self) -> None:
        """Say that it can be used, and how, ready to be copied."""
        self._say(f"ready: {self._url}")
        if not self._as_records:
            self._status.print(Text(printable(self._examples())), soft_wrap=True)

    def _say(self, line: str) -> None:
        if self._as_records:
            logger.info("%s", line)
        else:
            note(self._status, line)

    def _examples(self) -> str:
        header = ' -H "Authorization: Bearer $HYBRIDK2_API_KEY"' if self._key else ""
        message = f'{{"role": "user", "content": "{_QUESTION}"}}'
        return f"""
curl {self._url}/v1/chat/completions -H "Content-Type: application/json"{header} \\
  -d '{{"model": "{self._model}", "messages": [{message}]}}'

from openai import OpenAI
client = OpenAI(base_url="{self._url}/v1", api_key="{"YOUR KEY" if self._key else "none"}")
answer = client.chat.completions.create(model="{self._model}", messages=[{message}])
print(answer.choices[0].message.content)
"""
