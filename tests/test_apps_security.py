"""What the annotation apps refuse: other sites, other hosts, other paths, too much, too often; and what they never tell."""

import asyncio
import json
import logging
import re
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from judging_processes import PATIENCE_S
from judging_sites import PASSWORD, URL, Browser, Site, images, stores_are_closed, texts

from mmalign.annotation.intake import Limits as RowLimits
from mmalign.annotation.store import Store
from mmalign.apps.archives import unpack
from mmalign.apps.files import STATIC
from mmalign.apps.intake import Intake, data_at, inside
from mmalign.apps.people import add_people
from mmalign.apps.security import host_name
from mmalign.apps.server import Settings, create_app
from mmalign.errors import UserError

__all__ = ["stores_are_closed"]
PAGES = ("login.html", "projects.html", "judge.html")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7870", "localhost.evil.example", ""])
def test_a_foreign_host_name_gets_nothing_though_it_leads_here(tmp_path: Path, host: str) -> None:
    browser = Site(tmp_path).browser()
    for path in ("/", "/api/session", "/admin/", "/health"):
        reply = browser.get(path, host=host)
        assert reply.status_code == 421 and "set-cookie" not in reply.headers


def test_names_of_hosts_are_read_without_port_and_brackets() -> None:
    assert [host_name(host) for host in ("LocalHost:1", "[::1]:80", "10.0.0.1", "[::1]")] == [
        "localhost",
        "::1",
        "10.0.0.1",
        "::1",
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1:7870.evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_a_change_that_another_page_asks_for_is_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    site = Site(tmp_path, team=True)
    project, browser = site.project(texts()), site.browser("ada")
    current = browser.show(project)
    vote = {"assignment": current["assignment"], "revision": 1, "choice": "left"}
    assert browser.post(f"/api/projects/{project}/vote", vote, **headers).status_code == 403
    assert browser.post("/api/login", {"name": "ada", "password": PASSWORD}, **headers).status_code == 403
    assert browser.post("/admin/gradio_api/upload", {}, **headers).status_code == 403
    assert not site.store.votes(project)


def test_a_change_without_the_token_of_the_session_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project, ann, other = site.project(texts()), site.browser("ann"), site.browser("ann")
    current = ann.show(project)
    body: dict[str, Any] = {"assignment": current["assignment"], "revision": 1, "choice": "left"}
    for path in ("vote", "undo", "keep", "renew", "release", "displayed", "guideline"):
        for token in ("", "x", other.csrf):
            assert ann.post(f"/api/projects/{project}/{path}", body, x_csrf_token=token).status_code == 403
    assert ann.post("/api/logout", {}, x_csrf_token=other.csrf).status_code == 403
    assert not site.store.votes(project)
    assert ann.vote(project, current)["status"] == "stored"


def test_the_cookie_is_for_this_site_and_no_script(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    reply = Browser(site.app).post("/api/login", {"name": "ada", "password": PASSWORD})
    cookie = reply.headers["set-cookie"].lower()
    assert cookie.startswith("mmalign_session_7870=") and "secure" not in cookie
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/", "max-age=1209600"))


def test_behind_https_the_cookie_never_goes_another_way(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True, https=True)
    reply = Browser(site.app).post("/api/login", {"name": "ada", "password": PASSWORD})
    assert re.match(r"__Host-mmalign_session_7870=.*; Secure", reply.headers["set-cookie"])


def test_every_reply_bears_the_headers_refusals_too(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(images(tmp_path), kind="image"), site.browser()
    source = browser.next(project)["current"]["candidates"][0]["media"][0]["src"]
    for path in ("/", "/health", "/static/judge.js", "/nothing", source, "/media/none", "/api/projects/99/next"):
        headers = browser.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin" and headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
    refused = browser.get("/", host="evil.example")
    assert "default-src 'none'" in refused.headers["content-security-policy"]
    assert browser.get("/api/session").headers["cache-control"] == "no-store"


def test_the_policy_of_our_pages_lets_no_inline_code_run(tmp_path: Path) -> None:
    policy = Site(tmp_path).browser().get("/judge/1").headers["content-security-policy"]
    assert "script-src 'self';" in policy and "style-src 'self';" in policy and "base-uri 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy


@pytest.mark.parametrize("name", PAGES)
def test_our_pages_hold_no_inline_code_and_load_from_nowhere_else(name: str) -> None:
    page = (STATIC / name).read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\son\w+=|\sstyle=|javascript:", page)
    sources = re.findall(r"(?:src|href)=\"([^\"#]+)", page)
    assert sources and all(source.startswith("/") and not source.startswith("//") for source in sources)


def test_our_scripts_and_pages_never_write_data_as_markup_of_templates() -> None:
    for file in (STATIC.parent).glob("*.py"):
        source = file.read_text()
        assert not re.search(r"\bgradio\.HTML\(|\bgr\.HTML\(|sanitize_html=False", source), file.name
    for file in STATIC.glob("*.js"):
        assert not re.search(r"\beval\(|new Function\(|document\.write", file.read_text()), file.name


@pytest.mark.parametrize("path", ["/", "/judge/1", "/admin/", "/admin/gradio_api/info"])
def test_pages_lead_strangers_to_the_sign_in(tmp_path: Path, path: str) -> None:
    stranger = Site(tmp_path, team=True).browser()
    reply = stranger.get(path, accept="text/html")
    assert reply.status_code == 303 and reply.headers["location"] == f"/login?next={path}"


@pytest.mark.parametrize(
    "path", ["/api/session", "/api/projects", "/api/projects/1/next", "/api/projects/1/export", "/media/x", "/admin/config"]
)
def test_strangers_get_no_data(tmp_path: Path, path: str) -> None:
    reply = Site(tmp_path, team=True).browser().get(path)
    assert reply.status_code == 401 and "set-cookie" not in reply.headers


def test_pictures_are_for_who_is_signed_in(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project, ann = site.project(images(tmp_path), kind="image"), site.browser("ann")
    source = ann.next(project)["current"]["candidates"][0]["media"][0]["src"]
    assert ann.get(source).status_code == 200
    etag = ann.get(source).headers["etag"]
    assert site.browser().get(source, if_none_match=etag).status_code == 401


def test_annotators_get_no_page_of_administrators(tmp_path: Path) -> None:
    ann = Site(tmp_path, team=True).browser("ann")
    for path in ("/admin/", "/admin/config", "/admin/gradio_api/info", "/admin/monitoring/summary"):
        assert ann.get(path).status_code == 401
    assert ann.post("/admin/gradio_api/upload", {}).status_code == 401


def test_reviewers_upload_nothing(tmp_path: Path) -> None:
    rev = Site(tmp_path, team=True).browser("rev")
    assert rev.post("/admin/gradio_api/upload", {}).status_code == 403


@pytest.mark.parametrize(
    "span", ["bytes=\xb2-", "bytes=-\xb3", f"bytes={'9' * 5000}-", "bytes=-", "bytes=5-2", "items=0-1", "bytes=0-1,3-4"]
)
def test_ranges_that_are_none_break_nothing(tmp_path: Path, span: str) -> None:
    site = Site(tmp_path)
    project, browser = site.project(images(tmp_path), kind="image"), site.browser()
    source = browser.next(project)["current"]["candidates"][0]["media"][0]["src"]
    reply = browser.client.get(source, headers={"range": span.encode("latin-1")})
    assert reply.status_code == (416 if span == "bytes=5-2" else 200)


def test_signing_in_again_ends_the_session_that_this_browser_had(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    browser = site.browser("ann")
    former = browser.client.cookies["mmalign_session_7870"]
    assert browser.post("/api/login", {"name": "ada", "password": PASSWORD}).status_code == 200
    planted = site.browser()
    planted.client.cookies.set("mmalign_session_7870", former)
    assert planted.get("/api/session").status_code == 401
    assert browser.get("/api/session").json()["name"] == "ada"


def test_passwords_are_checked_two_at_a_time_whoever_asks(tmp_path: Path) -> None:
    site, most, now = Site(tmp_path, team=True), [0], set[object]()
    sign_in, two = site.store.sign_in, threading.Barrier(2)

    def counted(*given: Any, **named: Any) -> Any:
        now.add(me := object())
        two.wait(PATIENCE_S)  # there are two
        time.sleep(0.05)  # and no third comes
        most[0] = max(most[0], len(now))
        now.remove(me)
        return sign_in(*given, **named)

    site.store.sign_in = counted  # type: ignore[method-assign]

    async def all_at_once() -> list[int]:
        transport = httpx.ASGITransport(app=site.app)
        async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
            body = {"name": "ada", "password": PASSWORD}
            return [one.status_code for one in await asyncio.gather(*(client.post("/api/login", json=body) for _ in range(6)))]

    assert asyncio.run(all_at_once()) == [200] * 6 and most == [2]


def test_messages_of_the_admin_pages_hold_no_markup(tmp_path: Path) -> None:
    import gradio

    from mmalign.apps.admin import Desk

    def fails(desk: Desk, who: Any) -> None:
        raise UserError("account: got the name '<img src=x onerror=alert(1)>', which nobody has.")

    site = Site(tmp_path)
    with pytest.raises(gradio.Error) as fault:
        Desk(store=site.store, settings=site.settings, project=None).handler(fails)(gradio.Request(username="me"))
    assert "<" not in str(fault.value.message) and "&lt;img" in str(fault.value.message)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/..%5cserver.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/",
        "/static/judge.html/..",
        "/media/../judgements.db",
        "/media/..%2fjudgements.db",
        "/media/%2e%2e%2fjudgements.db",
        "/media//etc/passwd",
        "/judge/../static/../server.py",
    ],
)
def test_no_path_leads_out(tmp_path: Path, path: str) -> None:
    browser = Site(tmp_path).browser()
    sent = browser.client.build_request("GET", URL)
    sent.url = sent.url.copy_with(raw_path=path.encode())
    reply = browser.client.send(sent)
    assert reply.status_code in (303, 307, 404, 405), path
    assert b"root:" not in reply.content and b"SQLite" not in reply.content and b"import " not in reply.content


def test_a_body_that_is_too_large_is_refused_whatever_length_it_names(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    path, large = f"/api/projects/{project}/vote", b"x" * 70_000
    headers = {"origin": URL, "x-csrf-token": browser.csrf, "content-type": "application/json"}
    assert browser.client.post(path, content=large, headers=headers).status_code == 413
    assert browser.client.post(path, content=iter([large]), headers=headers).status_code == 413
    wrong = {**headers, "content-length": "-1"}
    assert browser.client.post(path, content=b"{}", headers=wrong).status_code == 400


@pytest.mark.parametrize(
    "change",
    [
        {"revision": 0},
        {"revision": "one"},
        {"choice": "a"},
        {"assignment": "../x"},
        {"assignment": "x" * 65},
        {"strength": 4},
        {"ranks": [1, 2, 3, 4, 5, 6, 7]},
        {"flags": {"unsafe": [9]}},
        {"rationale": "x" * 5000},
        {"aspects": {"x" * 200: "left"}},
        {"dwell_ms": -1},
    ],
)
def test_a_vote_that_is_none_is_refused_where_it_is_wrong(tmp_path: Path, change: dict[str, Any]) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    body = {"assignment": browser.show(project)["assignment"], "revision": 1, "choice": "left", **change}
    reply = browser.post(f"/api/projects/{project}/vote", body)
    assert reply.status_code == 422 and next(iter(change)) in reply.json()["detail"]
    assert not site.store.votes(project)


def test_others_reach_no_server_without_accounts(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "x.db"))
    try:
        for host in ("0.0.0.0", "::", "192.168.0.7"):
            with pytest.raises(UserError, match="without accounts"):
                create_app(store, Settings(host=host))
        with pytest.raises(UserError, match="no administrator"):
            create_app(store, Settings(host="0.0.0.0", accounts=True))
        store.add_account("ada", PASSWORD, "admin")
        create_app(store, Settings(host="0.0.0.0", accounts=True))
    finally:
        store.close()


def test_the_one_person_of_a_session_without_accounts_cannot_sign_in_to_a_team(tmp_path: Path) -> None:
    alone = Site(tmp_path).browser()
    assert alone.get("/api/session").status_code == 200
    site = Site(tmp_path, team=True)
    for password in ("", "me", "None"):
        assert site.browser().post("/api/login", {"name": "me", "password": password}).status_code == 403
    stale = site.browser()
    stale.client.cookies = alone.client.cookies
    assert stale.get("/api/session").status_code == 401


def test_who_guesses_passwords_has_to_wait(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    stranger = site.browser()
    tried = [stranger.post("/api/login", {"name": "ada", "password": f"guess {n}"}).status_code for n in range(7)]
    assert tried[:5] == [403] * 5 and 429 in tried[5:]
    reply = stranger.post("/api/login", {"name": "ada", "password": PASSWORD})
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1


def test_unknown_names_and_wrong_passwords_are_answered_alike(tmp_path: Path) -> None:
    stranger = Site(tmp_path, team=True).browser()
    known = stranger.post("/api/login", {"name": "ada", "password": "wrong password"})
    unknown = stranger.post("/api/login", {"name": "nobody", "password": "wrong password"})
    assert (known.status_code, known.content) == (unknown.status_code, unknown.content) == (403, known.content)


def test_no_secret_is_logged_or_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    site = Site(tmp_path, team=True)
    ada = site.browser("ada")
    token = ada.client.cookies["mmalign_session_7870"]
    replies = [
        site.browser().post("/api/login", {"name": "ada", "password": "a wrong password"}),
        site.browser().post("/api/login", {"name": ["ada"], "password": "another password", "more": 1}),
        ada.post("/api/password", {"old": "an old password", "new": {"x": "a new password"}}),
        ada.get("/api/session"),
    ]
    told = caplog.text + "".join(reply.text for reply in replies) + json.dumps([vars(one) for one in site.store.events()])
    for secret in (PASSWORD, "a wrong password", "another password", "an old password", "a new password", token):
        assert secret not in told
    assert token.encode() not in (tmp_path / "judgements.db").read_bytes()


def test_a_sign_in_outlives_a_restart_and_ends_when_it_is_ended(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    before = site.browser("ann")
    site.restart()
    after = Browser(site.app)
    after.client.cookies = before.client.cookies
    session = after.get("/api/session").json()
    assert session["name"] == "ann" and session["csrf"] == before.csrf
    after.csrf = session["csrf"]
    assert after.post("/api/logout", {}).status_code == 200
    again = Browser(site.app)
    again.client.cookies = before.client.cookies
    assert again.get("/api/session").status_code == 401


def test_a_new_password_ends_all_other_sessions(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    here, there = site.browser("ann"), site.browser("ann")
    assert here.post("/api/password", {"old": "wrong", "new": "a better password"}).status_code == 403
    assert here.post("/api/password", {"old": PASSWORD, "new": "short"}).status_code == 409
    reply = here.post("/api/password", {"old": PASSWORD, "new": "a better password"})
    assert reply.status_code == 200 and here.get("/api/session").json()["csrf"] == reply.json()["csrf"]
    assert there.get("/api/session").status_code == 401


def test_a_closed_account_is_out_at_once(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    ann = site.browser("ann")
    account = site.store.account("ann")
    assert account is not None
    site.store.change_account(account.id, active=False)
    assert ann.get("/api/session").status_code == 401


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:\\out.txt"])
def test_archives_leave_nothing_outside_of_their_folder(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "out")
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match="want plain files"):
        unpack(tmp_path / "x.zip", tmp_path / "target", most_bytes=1000)
    assert not list(tmp_path.rglob("out.txt"))


def test_archives_hold_no_links_and_do_not_grow_without_end(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    for number, (info, content) in enumerate([(link, "/etc"), (zipfile.ZipInfo("bomb"), "0" * 5000)]):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(info, content)
        (tmp_path / str(number)).mkdir()
        with pytest.raises(UserError, match=r"plain files|unpacks to more"):
            unpack(tmp_path / f"{number}.zip", tmp_path / str(number), most_bytes=1000)


def test_archives_of_plain_files_are_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("rows/a.jsonl", "{}")
    unpack(tmp_path / "x.zip", tmp_path, most_bytes=1000)
    assert (tmp_path / "rows" / "a.jsonl").read_text() == "{}"


def test_imports_by_path_stay_in_the_folders_that_were_named(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    assert inside(str(root), (root,)) == root.resolve()
    for path in ("/etc/passwd", str(root / ".." / "other"), str(root / "link" / "passwd"), str(tmp_path / "data2")):
        with pytest.raises(UserError, match="lies outside"):
            inside(path, (root,))


def test_uploaded_rows_cannot_name_pictures_of_the_server(tmp_path: Path) -> None:
    site = Site(tmp_path)
    secret, home = tmp_path / "secret", tmp_path / "home"
    secret.mkdir()
    home.mkdir()
    images(secret, 1)
    (home / "link.png").symlink_to(next(secret.glob("*.png")))
    named = [[str(path) for path in sorted(secret.glob("*.png"))], ["../secret/secret-model-a-0.png", "link.png"]]
    rows = [
        {"id": str(n), "prompt": {"text": "x"}, "candidates": [{"images": [{"path": path}]} for path in paths]}
        for n, paths in enumerate(named)
    ]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    project = site.store.create_project("uploaded", "image")
    intake = Intake(site.store, project.id, [data_at(str(home / "rows.jsonl"), limits=RowLimits(roots=(home,)))])
    with pytest.raises(UserError, match="no usable row"):
        intake.begin(30)
        intake.join()
        raise intake.fault or AssertionError("rows were added")
    assert site.store.progress(project.id).items == 0


def test_a_file_of_accounts_is_for_its_owner_alone_and_never_quoted(tmp_path: Path) -> None:
    store, file = Store.open(str(tmp_path / "x.db")), tmp_path / "accounts.yaml"
    try:
        file.write_text(f"ada: {{role: admin, password: {PASSWORD}}}\nann: {{password: another long one}}\n")
        file.chmod(0o644)
        with pytest.raises(UserError, match="chmod 600"):
            add_people(store, file)
        file.chmod(0o600)
        assert add_people(store, file) == 2 and add_people(store, file) == 0
        assert {one.name: one.role for one in store.accounts()} == {"ada": "admin", "ann": "annotator"}
        assert store.sign_in("ada", PASSWORD).status == "ok"
        for broken in ("ada: {password: [hidden words", "bob: hidden words", "bob: {role: king, password: hidden words}"):
            file.write_text(broken)
            with pytest.raises(UserError) as fault:
                add_people(store, file)
            assert "hidden" not in str(fault.value)
    finally:
        store.close()


def test_each_handler_of_the_admin_pages_asks_again_who_may(tmp_path: Path) -> None:
    import gradio

    from mmalign.apps.admin import Desk

    site = Site(tmp_path, team=True)
    site.browser("rev")
    desk = Desk(store=site.store, settings=site.settings, project=None)
    call = desk.handler(lambda desk, who, value: (who.name, value), "admin")
    assert call(gradio.Request(username="ada"), 3) == ("ada", 3)
    for name in ("rev", "nobody", None):
        with pytest.raises(gradio.Error, match="needs the role admin"):
            call(gradio.Request(username=name), 3)
