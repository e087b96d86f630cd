"""`mmalign annotate` as a process: it opens data, survives kill -9 at the worst moment, and refuses what cannot be."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from judging_processes import PATIENCE_S, ROOT, free_port, running
from judging_sites import images
from PIL import Image

from mmalign.annotate import AnnotateConfig
from mmalign.annotation.store import Store
from mmalign.apps.intake import Intake, data_at
from mmalign.cli import main
from mmalign.config import read_config
from mmalign.errors import UserError

# Dies after a vote is on disk and before anybody is told, once.
DYING = """
import os, signal, sys
from mmalign.annotation.store import Store
cast = Store.vote
def vote(self, *given, **named):
    cast(self, *given, **named)
    os.kill(os.getpid(), signal.SIGKILL)
Store.vote = vote
from mmalign.cli import main
sys.exit(main(sys.argv[1:]))
"""


def rows(folder: Path, count: int = 5) -> Path:
    file = folder / "rows.jsonl"
    lines = [
        {"id": str(n), "prompt": {"text": f"question {n}"}, "candidates": [{"text": f"one {n}"}, {"text": f"other {n}"}]}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def body_of_current(client: httpx.Client, project: int = 1) -> dict[str, Any]:
    current = client.get(f"/api/projects/{project}/next").json()["current"]
    client.post(f"/api/projects/{project}/displayed", json={"assignment": current["assignment"]})
    return {"assignment": current["assignment"], "revision": current["revision"], "choice": "left"}


def test_a_vote_survives_kill_9_between_commit_and_reply_and_is_counted_once(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["text", str(rows(tmp_path)), "--store", str(tmp_path / "j.db"), "--port", str(port)]
    arguments += ["protocol.min_dwell_ms=0", "protocol.overlap_share=0", "protocol.repeat_share=0"]
    alone = httpx.Limits(max_keepalive_connections=0)  # a connection that waits is closed by the server at some moment
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, limits=alone) as client:
        with running(*arguments, program=DYING) as server:
            assert "5 new items" in "".join(server.told)
            client.headers["x-csrf-token"] = client.get("/api/session").json()["csrf"]
            vote = body_of_current(client)
            with pytest.raises(httpx.TransportError):
                client.post("/api/projects/1/vote", json=vote)
            assert server.process.wait(PATIENCE_S) == -signal.SIGKILL
        with running(*arguments) as server:
            reply = client.post("/api/projects/1/vote", json=vote)
            assert reply.status_code == 200, "the session is gone"
            assert reply.json()["status"] == "duplicate" and reply.json()["stands"]["choice"] == "left"
            assert reply.json()["current"]["assignment"] != vote["assignment"]
            assert client.post("/api/projects/1/vote", json=body_of_current(client)).json()["status"] == "stored"
            check_admin_pages(client)
        assert "new items" not in "".join(server.told), "unchanged data were read again"
    store = Store.open(str(tmp_path / "j.db"))
    assert len(store.votes(1, latest=False)) == 2 and store.progress(1).items == 5
    store.close()


def check_admin_pages(client: httpx.Client) -> None:
    """Gradio is behind the same door, and each of its scripts bears the nonce."""
    headers = {"accept": "text/html", "accept-encoding": "gzip, br"}
    page = client.get("/admin/", headers=headers)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
    scripts = re.findall(r"<script[^>]*>", page.text)
    assert len(scripts) > 3 and all(f'nonce="{nonce}"' in script for script in scripts)
    assert "unsafe-eval" not in policy and "unsafe-inline" not in policy.partition("style-src")[0]
    config = client.get("/admin/config").json()
    assert config["footer_links"] == [] and config["run_history"] is False and config["analytics_enabled"] is False
    for path in ("/etc/passwd", "..%2f..%2fetc%2fpasswd", str(ROOT / "pyproject.toml"), "judgements.db"):
        assert client.get(f"/admin/gradio_api/file={path}").status_code in (403, 404), path
    assert httpx.get(f"{client.base_url}/admin/config").status_code == 401
    assert httpx.get(f"{client.base_url}/admin/", headers=headers).status_code == 303


def test_judging_loads_neither_gradio_nor_torch(tmp_path: Path) -> None:
    program = f"""
import sys
from starlette.testclient import TestClient
from mmalign.annotate import AnnotateConfig, _data, _project, _settings
from mmalign.annotation.store import Store
from mmalign.apps.intake import Intake
from mmalign.apps.server import create_app
config = AnnotateConfig(what=("text", {str(rows(tmp_path))!r}), store={str(tmp_path / "j.db")!r})
store = Store.open(config.store)
project = _project(store, config, _data(config))
Intake(store, project.id, _data(config)).begin(600)
client = TestClient(create_app(store, _settings(config)), base_url="http://127.0.0.1:7870")
client.get("/judge/1"), client.get("/api/session")
assert client.get("/api/projects/1/next").json()["current"]
print([name for name in ("torch", "transformers", "diffusers", "gradio", "matplotlib", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["images", "nothing/there"], "nothing/there: got no such file or folder"),
        (["pictures", "x"], "what: got 'pictures x', want `images DATA` or `text DATA`"),
        (["text", "rows.jsonl", "--importer", "trll"], "Did you mean trl"),
        (["text", "rows.jsonl", "--host", "0.0.0.0"], "host: got '0.0.0.0' without accounts"),
        (["text", "rows.jsonl", "--port", "70000"], "port: got 70000"),
        (["text", "rows.jsonl", "--accounts", "none.yaml"], "accounts: none.yaml cannot be read"),
        (["text", "rows.jsonl", "--share-with", "team"], "accounts: got no administrator"),
        (["text"], "store: there is no"),
        (["text", "--gold", "rows.jsonl"], "data: got none"),
        (["text", "rows.jsonl", "--guideline", "none.md"], "guideline: none.md cannot be read"),
        (["text", "rows.jsonl", "--store", "mysql://me:hidden@x/y"], "want SQLite or PostgreSQL"),
        (["text", "rows.jsonl", "protocol.gold_share=2"], "gold_share"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_served(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main(["annotate", *arguments, *port]) == 2
    told = capsys.readouterr().err
    assert said in told and "hidden" not in told


def test_a_port_that_is_taken_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert main(["annotate", "text", str(rows(tmp_path)), "--port", str(listener.getsockname()[1])]) == 2
    assert "Set another --port" in capsys.readouterr().err
    assert not (tmp_path / "judgements.db").exists()


def test_a_project_is_judged_by_the_protocol_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path)
    store = Store.open("judgements.db")
    store.create_project("rows", "text")
    store.close()
    assert main(["annotate", "text", "rows.jsonl", "--port", "0", "protocol.strength=true"]) == 2
    assert "another protocol than it was begun with" in capsys.readouterr().err
    assert main(["annotate", "images", "rows.jsonl", "--port", "0"]) == 2
    assert "it is of kind text" in capsys.readouterr().err


def test_settings_are_read_from_the_command_line() -> None:
    overrides = ['what=["images", "folder"]', "protocol.strength=true", 'protocol.aspects=["fidelity"]', "share_with=team"]
    config = read_config(AnnotateConfig, None, overrides)
    assert config.path == "folder" and config.protocol.strength and config.protocol.aspects == ("fidelity",)


def test_folders_of_images_with_prompts_are_opened(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    for row in images(tmp_path, 3):
        for folder, candidate in zip(("one", "other"), row.candidates, strict=True):
            (tmp_path / folder / f"{row.id}.png").write_bytes(candidate.images[0].read())
        (tmp_path / f"{row.id}.txt").write_text(row.prompt.text or "")
    store = Store.open(str(tmp_path / "j.db"))
    project = store.create_project("x", "image")
    for expected in (3, 0):  # the second time they are known as a whole, and not read
        intake = Intake(store, project.id, [data_at(str(tmp_path))])
        intake.begin(600)
        intake.join()
        assert (intake.added.added, intake.num_read) == (expected, expected)
    store.close()


def jpg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def foreign(folder: Path, form: str) -> Path:
    """Three rows as others keep them, and one that is broken; no setting says which form it is."""
    from datasets import Dataset

    if form == "pick_a_pic.parquet":
        rows = [
            {"caption": f"cat {n}", "jpg_0": jpg(n), "jpg_1": jpg(n + 90), "label_0": 1.0, "label_1": 0.0} for n in range(3)
        ]
        Dataset.from_list([*rows, {**rows[0], "caption": ""}]).to_parquet(folder / form)
        return folder / form
    pairs = [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)]
    if form == "talk.jsonl":
        pairs = [
            {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"good {n}"}],
             "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"bad {n}"}]}
            for n in range(3)
        ]  # fmt: skip
    if form == "hh.jsonl":
        pairs = [{name: f"\n\nHuman: q\n\nAssistant: {name} {n}" for name in ("chosen", "rejected")} for n in range(3)]
    if form == "saved":
        Dataset.from_list([*pairs, {**pairs[0], "chosen": ""}]).save_to_disk(folder / form)
        return folder / form
    text = "".join(json.dumps(pair) + "\n" for pair in pairs) + '{"chosen": 3}\n'
    if form.endswith(".json"):
        text = json.dumps([*pairs, {"chosen": 3}])
    (folder / form).write_text(text)
    return folder / form


@pytest.mark.parametrize("form", ["trl.jsonl", "talk.jsonl", "hh.jsonl", "trl.json", "saved", "pick_a_pic.parquet"])
def test_foreign_data_are_known_by_their_columns_and_open_without_an_importer(form: str, tmp_path: Path) -> None:
    kind = "image" if form.startswith("pick") else "text"
    store = Store.open(str(tmp_path / "j.db"))
    project = store.create_project("x", kind)
    intake = Intake(store, project.id, [data_at(str(foreign(tmp_path, form)))])
    intake.begin(600)
    intake.join()
    assert intake.fault is None and (intake.added.added, intake.added.num_faults) == (3, 1)
    [first, *_] = store.items(project.id)
    if kind == "text":
        assert first.comparison.prompt.words().strip().removeprefix("Human:").strip().startswith("q")
        assert [one.words().split()[-2:] for one in first.comparison.candidates] in (
            [["good", "0"], ["bad", "0"]],
            [["chosen", "0"], ["rejected", "0"]],
        )
    store.close()


HALF = {"prompt": {"text": "\ud83d"}, "candidates": [{"text": "x"}, {"text": "y"}]}


@pytest.mark.parametrize(
    ("row", "said"),
    [({"some": "thing"}, "unknown key some"), ({"prompt": "\ud83d", "chosen": "x", "rejected": "y"}, "half"), (HALF, "half")],
)
def test_data_of_which_no_row_can_be_used_are_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "1", **row}) + "\n")
    store = Store.open(str(tmp_path / "j.db"))
    intake = Intake(store, store.create_project("x", "text").id, [data_at(str(tmp_path / "rows.jsonl"))])
    with pytest.raises(UserError, match=said):
        intake.begin(600)
    store.close()


def test_rows_that_cannot_be_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = rows(tmp_path, 2)
    file.write_text(file.read_text() + '{"id": "alone", "prompt": {"text": "x"}, "candidates": [{"text": "one"}]}\n')
    store = Store.open(str(tmp_path / "j.db"))
    intake = Intake(store, store.create_project("x", "text").id, [data_at(str(file))])
    intake.begin(600)
    intake.join()
    assert (intake.added.added, intake.added.num_faults) == (2, 1)
    assert "1 rows not usable" in caplog.text and "rows.jsonl:3" in caplog.text
    store.close()


@pytest.mark.parametrize("kind", ["images", "text"])
def test_the_launchers_are_the_verb(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, f"apps/annotate_{kind}.py", "nothing/there"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("nothing/there: got no such file or folder"), done.stderr
