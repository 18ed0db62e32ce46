"""Models of the hub: put there, fetched and refused, against a small server that speaks its HTTP."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from duotok.recipes.accompany import generate, publish
from duotok.recipes.accompany.bundle import load_bundle
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.common.hub import local_folder, push_folder
from duotok.tokenizer.model import DuoTokenizer


class Hub(ThreadingHTTPServer):
    """Holds models in memory: {name: {branch: {path: bytes}}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.private: dict[str, str | None] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, branch: str) -> str:
        """Remember a branch as it is now; return the commit's name."""
        files = self.models[name][branch]
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        return digest


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def tell(self, status: int, value: object = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        kind, *path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if kind != "api":  # owner/name/resolve/revision/path
            name, (_, revision, *inner) = f"{kind}/{path[0]}", path[1:]
        else:  # api/models/owner/name/(revision|tree)/revision
            name, inner = "/".join(path[1:3]), []
            revision = path[4] if len(path) > 4 else "main"
        if name not in self.server.models:
            return self.tell(401, {"error": "no"}, X_Error_Code="RepoNotFound")
        if revision in self.server.models[name]:
            revision = self.server.commit(name, revision)
        if revision not in self.server.commits:
            return self.tell(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        files = self.server.commits[revision]
        if kind == "api" and path[3:4] == ["tree"]:
            digests = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
            facts = [
                {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
                for path, oid in digests.items()
            ]
            return self.tell(200, facts)
        if kind == "api":
            return self.tell(200, {"id": name, "sha": revision, "siblings": [], "private": False})
        data = files["/".join(inner)]
        if self.command == "GET":
            self.server.fetched.append("/".join(inner))
        etag = hashlib.sha256(data).hexdigest()
        self.tell(200, data, X_Repo_Commit=revision, ETag=f'"{etag}"')

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.tell(401, {"error": "who are you?"})
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        models = self.server.models
        if path[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.private[name] = asked.get("visibility")
            status = 409 if name in models else 200
            models.setdefault(name, {"main": {}})
            return self.tell(status, {"url": f"{self.server.url}/{name}"})
        if path[1:] == ["validate-yaml"]:
            return self.tell(200, {"errors": [], "warnings": []})
        if path[-1] == "batch":
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}
            return self.tell(200, {"objects": objects, "transfer": "basic"})
        name, what, branch = "/".join(path[2:4]), path[4], path[5]
        if what == "branch":
            status = 409 if branch in models[name] else 200
            models[name].setdefault(branch, dict(models[name]["main"]))
            return self.tell(status, {})
        if what == "preupload":
            files = json.loads(body)["files"]
            for each in files:
                is_large = each["path"].endswith(".safetensors")
                each |= {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            return self.tell(200, {"files": files})
        files = models[name][branch]
        for line in body.splitlines():
            key, value = json.loads(line).values()
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        digest = self.server.commit(name, branch)
        self.tell(200, {"commitUrl": f"{self.server.url}/{name}/commit/{digest}", "commitOid": digest})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == self.path.split("/")[-1]
        self.server.large[self.path.split("/")[-1]] = data
        self.tell(200)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    settings |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True}  # weights by plain HTTP
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)  # read from the environment at its import
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model(tiny_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "mine"))


def test_a_model_that_is_published_plays_elsewhere(hub, model, vocal_file, tmp_path, capsys):
    (model / ".hidden.json").write_text("{}")
    (model / "notes.txt").write_text("mine")
    assert publish.main([str(model), "me/band", "--private"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/band/commit/")
    stored = hub.models["me/band"]["main"]
    wanted = {path.relative_to(model).as_posix() for path in model.rglob("*.*") if path.is_file()}
    assert set(stored) == wanted - {".hidden.json", "notes.txt"} and hub.private == {"me/band": "private"}
    assert stored["README.md"].startswith(b"---\nlibrary_name: duotok")
    options = ["--model", "me/band@main", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert generate.main(["--vocal", str(vocal_file), *options]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["model"]["name"] == "tiny"


def test_what_is_published_again_takes_the_place_of_what_was_there(hub, model):
    first = load_bundle(model)
    push_folder(model, "me/band", message="first")
    hub.models["me/band"]["main"]["lm/model-00002-of-00002.safetensors"] = b"of an older model"
    push_folder(model, "me/band", message="second")
    assert load_bundle("me/band").fingerprint == first.fingerprint
    push_folder(model / "tokenizer", "me/band", revision="parts", message="a component")
    assert sorted(hub.models["me/band"]["parts"]) == ["config.json", "model.safetensors"]
    for source, revision in (("me/band@parts", None), ("me/band", "parts")):
        tokenizer = DuoTokenizer.from_pretrained(source, revision=revision)
        assert tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(CheckpointError, match="me/band on the hub has no revision 'none'"):
        Accompanist.from_pretrained("me/band", revision="none")


def test_only_weights_and_texts_are_fetched(hub, model):
    push_folder(model, "me/band", message="x")
    hub.models["me/band"]["main"] |= {"run.py": b"import os", "lm/weights.bin": b"pickle", "lm/x.ckpt": b""}
    folder = local_folder("me/band")
    assert not {"run.py", "lm/weights.bin", "lm/x.ckpt"} & set(hub.fetched)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(hub.fetched) and "bundle.json" in found


@pytest.mark.parametrize("name", ["../../escaped.json", "lm/../../../../escaped.json", "/escaped.json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(hub, name, tmp_path):
    hub.models["me/band"] = {"main": {"config.json": b"{}", name: b"{}"}}
    with pytest.raises(CheckpointError, match="me/band of the hub cannot be used") as told:
        local_folder("me/band")
    assert "\n" not in str(told.value)
    outside = [path for path in tmp_path.rglob("escaped.json") if "snapshots" not in path.parts]
    assert outside == [] and not Path("/escaped.json").exists()


def test_without_a_connection_what_was_fetched_before_is_used(hub, model, tmp_path, monkeypatch, capsys):
    push_folder(model, "me/band", message="x")
    folder = local_folder("me/band")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert local_folder("me/band") == folder
    assert load_bundle("me/band").name == "tiny"
    (tmp_path / "song.wav").write_bytes(b"")
    assert publish.main([str(model), "me/band"]) == 1
    assert capsys.readouterr().err == (
        "error: me/band is no folder here, and the hub cannot be reached; connect, or give a folder\n"
    )
    with pytest.raises(CheckpointError, match="me/other is no folder here, and the hub cannot be reached"):
        local_folder("me/other")


def test_what_may_not_be_read_or_written(hub, model, monkeypatch, capsys):
    with pytest.raises(CheckpointError, match=r"the hub refuses me/none \(401\)"):
        local_folder("me/none")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert publish.main([str(model), "me/band"]) == 1
    assert "hf auth login" in capsys.readouterr().err
    (model / "lm" / "config.json").unlink()
    assert publish.main([str(model), "me/band"]) == 1
    assert "lm/config.json is missing" in capsys.readouterr().err and hub.models == {}


@pytest.mark.parametrize(
    "name", ["band", "me/a/b", "me/../band", "me/ba..nd", "-me/band", "me/band@../x", ""]
)
def test_odd_names_are_folders_that_are_not_there_and_no_names_to_publish_by(name, tmp_path):
    assert local_folder(name) == Path(name)
    with pytest.raises(CheckpointError, match="give it as owner/name"):
        push_folder(tmp_path, name, message="x")
    with pytest.raises(CheckpointError, match="no revision"):
        local_folder("me/band", "../x")


def test_a_folder_comes_before_the_hub(small_tokenizer_folder, tmp_path, monkeypatch):
    shutil.copytree(small_tokenizer_folder, tmp_path / "me" / "band")
    monkeypatch.chdir(tmp_path)
    assert local_folder("me/band") == Path("me/band")
    with pytest.raises(CheckpointError, match="is no model of the hub"):
        local_folder("me/band", "main")
