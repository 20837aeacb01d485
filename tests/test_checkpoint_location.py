"""What stands after --model becomes a folder, or an error that says what to do."""

import json
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from hybridk2.checkpoint import Checkpoint, LoadProgress, download_model, locate_model, location
from hybridk2.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "moonshotai/Kimi-K2-Thinking"


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert locate_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert locate_model("~/models") == tmp_path / "models"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="expected the folder of a checkpoint, found a file"):
        locate_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["no-such-folder", "/no/such/folder", "a/b/c", "../a b"])
def test_what_is_neither_folder_nor_hub_id_is_refused_with_the_choices(model):
    with pytest.raises(CheckpointError, match='Give a checkpoint folder, an id, or "nano"'):
        locate_model(model)


def test_nano_is_the_model_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(location.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="missing from this installation"):
        locate_model("nano")
    (tmp_path / "nano" / "checkpoint").mkdir(parents=True)
    assert locate_model("nano") == tmp_path / "nano" / "checkpoint"


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="--download"):
        locate_model(HUB_ID)
    repository = tmp_path / "models--moonshotai--Kimi-K2-Thinking"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    assert locate_model(HUB_ID) == snapshot


def test_without_the_hub_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for find in (locate_model, lambda hub_id: download_model(hub_id, lambda progress: None)):
        with pytest.raises(CheckpointError, match=r"pip install 'hybridk2\[hub\]'"):
            find(HUB_ID)


class Hub(ThreadingHTTPServer):
    """The few pages of the Hugging Face hub that a download asks for, over one local folder."""

    request_queue_size = 64  # the client opens several connections at once

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubPages)
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.broken_file: str | None = None
        self.requests: list[tuple[str, str]] = []

    def listing(self, name: str) -> dict:
        content = self.files[name]
        digest = sha256(content).hexdigest()
        entry = {"rfilename": name, "path": name, "type": "file", "size": len(content)}
        return {**entry, "oid": digest[:40], "blobId": digest[:40]}


class HubPages(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send_content=False)

    def do_GET(self) -> None:
        self.answer(send_content=True)

    def answer(self, send_content: bool) -> None:
        path, hub = self.path.split("?")[0], self.server
        hub.requests.append((self.command, path))
        listing = [hub.listing(name) for name in hub.files]
        if path.startswith(f"/api/models/{HUB_ID}/tree/"):
            self.reply(200, json.dumps(listing).encode(), {})
        elif path.startswith(f"/api/models/{HUB_ID}"):
            info = {"id": HUB_ID, "modelId": HUB_ID, "sha": COMMIT, "siblings": listing}
            self.reply(200, json.dumps(info).encode(), {})
        elif (name := path.rsplit("/", 1)[-1]) in hub.files and f"/resolve/{COMMIT}/" in path:
            self.send_file(name, send_content)
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str, send_content: bool) -> None:
        content = self.server.files[name]
        headers = {"ETag": f'"{sha256(content).hexdigest()[:40]}"', "X-Repo-Commit": COMMIT}
        sent_bytes = len(content) if send_content else 0
        if name == self.server.broken_file:
            sent_bytes //= 2
        self.reply(200, content, headers, sent_bytes)

    def reply(
        self, status: int, content: bytes, headers: dict[str, str], sent_bytes: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(content[:sent_bytes])


@pytest.fixture
def hub(small_checkpoint: Path, tmp_path: Path, monkeypatch) -> Iterator[Hub]:
    with Hub(small_checkpoint) as server:
        server.files["modeling_deepseek.py"] = b"raise SystemExit('never fetched')"
        server.files["tiktoken.model"] = b"IQ== 0\n"
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_fetches_what_inference_needs_and_no_code(hub, capfd):
    reports: list[LoadProgress] = []
    folder = download_model(HUB_ID, reports.append)
    assert locate_model(HUB_ID) == folder
    names = {path.name for path in folder.iterdir()}
    assert names == hub.files.keys() - {"modeling_deepseek.py"}
    for name in names:
        assert (folder / name).read_bytes() == hub.files[name]
    size = sum(len(hub.files[name]) for name in names)
    assert (reports[-1].done_bytes, reports[-1].total_bytes) == (size, size)
    assert Checkpoint.open(folder).expert_bytes
    assert capfd.readouterr().out == ""


def test_a_download_that_broke_off_says_so_and_keeps_what_was_complete(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own retries
    hub.broken_file = "model-00002-of-000004.safetensors"
    with pytest.raises(CheckpointError, match="Run the command again to resume it"):
        download_model(HUB_ID, lambda progress: None)
    with pytest.raises(CheckpointError, match="of 4 shards are missing"):
        Checkpoint.open(locate_model(HUB_ID))
    hub.broken_file = None
    finished = {path.name for path in locate_model(HUB_ID).iterdir()}
    hub.requests.clear()
    reports: list[LoadProgress] = []
    assert Checkpoint.open(download_model(HUB_ID, reports.append)).expert_bytes
    assert finished
    fetched = {path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "GET"}
    assert not fetched & finished
    needed = hub.files.keys() - {"modeling_deepseek.py"} - finished
    assert reports[-1].total_bytes == sum(len(hub.files[name]) for name in needed)


def test_a_model_that_the_hub_does_not_know_is_refused_as_that(hub):
    with pytest.raises(CheckpointError, match="the hub knows no such model"):
        download_model("moonshotai/Kimi-K9", lambda progress: None)
