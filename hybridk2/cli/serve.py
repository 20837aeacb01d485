"""`hybridk2 serve`: what the person chose, and a server of it until a signal ends it."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from hybridk2.cli.options import engine_options, model_options
from hybridk2.cli.outputs import output_option
from hybridk2.errors import ConfigError

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant
    from hybridk2.checkpoint import LoadProgress
    from hybridk2.config import EngineConfig
    from hybridk2.server.listener import HttpServer
    from hybridk2.server.security import Gate

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 1.0  # for the engine to finish its step at the end
_KEPT_SHARE = 4  # one in so many places of the queue is kept from background requests


def _refuse_key_on_command_line(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    source = ctx.get_parameter_source(parameter.name or "")
    if source is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(
            "an API key on the command line can be read by every user of this machine: put it into "
            "a file for --api-key-file, or into HYBRIDK2_API_KEY"
        )
    return value


@click.command("serve")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes any that is free.",
)
@click.option("--served-model-name", "names", multiple=True, help="What clients call the model.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File of API keys, one a line; HYBRIDK2_API_KEY may hold one instead.",
)
@click.option(
    "--api-key", envvar="HYBRIDK2_API_KEY", hidden=True, callback=_refuse_key_on_command_line
)
@click.option(
    "--without-api-key",
    is_flag=True,
    help="Serve other machines although nobody is asked for a key.",
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Host names to answer to.")
@click.option("--cors-origin", multiple=True, metavar="ORIGIN", help="Web pages that may ask.")
@click.option(
    "--max-running",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Requests that compute side by side.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests that may wait beyond those; more are refused.",
)
@click.option("--request-timeout", type=click.FloatRange(1), help="Seconds a request may take.")
@click.option(
    "--drain-seconds",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="What a first SIGTERM or Ctrl-C gives open requests to finish.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the log on standard error.",
)
@output_option(
    "--record-routing",
    "trace",
    help="Record which experts each decoded token picks, for `hybridk2 tune`; never text.",
)
@engine_options
@click.pass_context
def serve(
    ctx: click.Context,
    model: str,
    download: bool,
    host: str,
    port: int,
    names: tuple[str, ...],
    api_key_file: Path | None,
    api_key: str | None,
    without_api_key: bool,
    allow_host: tuple[str, ...],
    cors_origin: tuple[str, ...],
    max_running: int,
    max_queue: int,
    request_timeout: float | None,
    drain_seconds: float,
    log_format: str,
    trace: Path | None,
    threads: int | None,
    context: int | None,
    dtype: Literal["bfloat16", "float32"],
    **card: Any,
) -> None:
    """Answer over HTTP, with OpenAI's and Anthropic's interfaces.

    Listens at once; /health says when the model is loaded. The first SIGTERM or Ctrl-C lets open
    requests finish, the second ends at once.
    """
    from rich.console import Console

    from hybridk2.cli.announcements import Announcements
    from hybridk2.cli.log_lines import log_to
    from hybridk2.config import EngineConfig
    from hybridk2.server.app import create_app
    from hybridk2.server.context import ServerContext, ServerSettings
    from hybridk2.server.listener import HttpServer, listen
    from hybridk2.server.metrics import ServerMetrics
    from hybridk2.server.worker import EngineWorker

    gate = _gate(host, api_key_file, api_key, allow_host, without_api_key)
    capacity = max_running + max_queue
    choices = EngineConfig(
        model=model,
        dtype=dtype,
        threads=threads,
        context_tokens=context,
        max_running=max_running,
        # The server itself refuses what is beyond the queue; the engine sees requests before it
        # starts them, so its own queue has to hold them all.
        max_queued=capacity,
        **card,
    )
    settings = ServerSettings(names or (Path(model).name,), cors_origin, request_timeout)
    listening = listen(host, port)
    status = Console(stderr=True)
    log_to(status, as_json=log_format == "json")

    metrics = ServerMetrics()
    moments: SimpleQueue[LoadProgress | None] = SimpleQueue()
    worker = EngineWorker(
        _loader(choices, download, trace, moments),
        capacity,
        metrics.count_reply,
        reserved=math.ceil(max_queue / _KEPT_SHARE),
    )
    server_context = ServerContext(worker, settings, metrics)
    server = HttpServer(create_app(server_context, gate), server_context, drain_seconds)
    announcements = Announcements(
        status,
        log_format == "json",
        _url(host, listening.getsockname()[1]),
        settings.model_names[0],
        bool(gate.keys),
    )
    announcements.listening()

    def announce() -> None:
        announcements.loading(iter(moments.get, None))
        worker.ready.wait()
        if worker.state == "ready":
            announcements.ready()
        else:
            server.should_exit = True

    threading.Thread(target=announce, name="start", daemon=True).start()
    server.run([listening])
    if not worker.close(_GRACE_SECONDS):
        _leave_at_once(_exit_status(server))
    if worker.failure is not None:
        raise worker.failure
    ctx.exit(_exit_status(server))


def _gate(
    host: str,
    key_file: Path | None,
    key: str | None,
    allowed_hosts: tuple[str, ...],
    without_key: bool,
) -> Gate:
    """Who may ask. Refuses to serve other machines without a key, unless that was asked for."""
    from hybridk2.server.security import gate, is_loopback, read_key_file, read_keys

    keys = read_keys(key, "HYBRIDK2_API_KEY") if key else ()
    keys += read_key_file(key_file) if key_file else ()
    if not keys and not without_key and not is_loopback(host):
        raise ConfigError(
            f"host {host} is reached from other machines, and there is no API key: give "
            "--api-key-file or HYBRIDK2_API_KEY, or serve everyone with --without-api-key"
        )
    return gate(keys, host, allowed_hosts)


def _loader(
    choices: EngineConfig,
    download: bool,
    trace: Path | None,
    moments: SimpleQueue[LoadProgress | None],
) -> Callable[[Callable[[LoadProgress], None]], Assistant]:
    """What loads the model in the worker's thread; `moments` gets its progress, then None.

    trace: where routing is recorded from then on.
    """

    def load(on_progress: Callable[[LoadProgress], None]) -> Assistant:
        from hybridk2.assistant import Assistant
        from hybridk2.checkpoint import download_model

        def tell(progress: LoadProgress) -> None:
            on_progress(progress)
            moments.put(progress)

        try:
            if download:
                download_model(choices.model, tell)
            assistant = Assistant.load(choices, tell)
            if trace is not None:
                _record_routing(assistant, trace)
            return assistant
        finally:
            moments.put(None)

    return load


def _record_routing(assistant: Assistant, trace: Path) -> None:
    """Into `trace`, after what an earlier server recorded there. Raises TuningError."""
    from hybridk2.routing_trace import SERVED_BLOCK_TOKENS, TraceRecorder, TraceWriter

    try:
        writer = TraceWriter(trace, assistant.trace_header("server"))
    except BaseException:
        assistant.close()
        raise
    assistant.record_routing(TraceRecorder(writer, SERVED_BLOCK_TOKENS))
    logger.info("routing is recorded to %s, after %d tokens", trace, writer.tokens)


def _url(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    if host in ("0.0.0.0", "::"):  # every address of it
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _exit_status(server: HttpServer) -> int:
    return 0 if server.forced_by is None else 128 + server.forced_by


def _leave_at_once(code: int) -> NoReturn:
    """End without waiting for the engine, which may be minutes deep in a step or a load."""
    sys.stderr.flush()
    os._exit(code)
