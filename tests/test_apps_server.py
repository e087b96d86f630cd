"""The routes of the annotation apps: what the judging page asks, and what it is answered."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from judging_sites import MAKERS, OPEN, Site, images, png, stores_are_closed, texts

from mmalign.annotation.store import Store
from mmalign.records import Comparison, Content, Media, Message, comparison

__all__ = ["stores_are_closed"]


def test_on_ones_own_machine_a_session_is_opened_without_sign_in(tmp_path: Path) -> None:
    browser = Site(tmp_path).browser()
    session = browser.get("/api/session").json()
    assert (session["name"], session["role"], session["accounts"]) == ("me", "admin", False)


def test_the_same_item_is_shown_until_it_is_judged_and_the_next_one_is_known_before(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    first, again = browser.next(project), browser.next(project)
    for place in ("current", "ahead"):
        assert first[place].pop("expires_at") <= again[place].pop("expires_at")
        assert first[place] == again[place]
    reply = browser.vote(project, browser.show(project))
    assert reply["status"] == "stored"
    assert reply["current"]["assignment"] == first["ahead"]["assignment"]
    assert reply["progress"]["judged"] == 1 and reply["progress"]["total"] == 4


def test_a_vote_sent_twice_is_stored_once_and_answered_with_the_same_next(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    current = browser.show(project)
    first, second = browser.vote(project, current, "left"), browser.vote(project, current, "right")
    assert (first["status"], second["status"]) == ("stored", "duplicate")
    assert second["stands"]["choice"] == "left"
    assert second["current"]["assignment"] == first["current"]["assignment"]
    assert len(site.store.votes(project, latest=False)) == 1


def test_a_vote_on_what_was_never_on_screen_is_refused_with_a_reason(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    reply = browser.vote(project, browser.next(project)["current"])
    assert (reply["status"], reply["reason"]) == ("refused", "not_displayed")
    assert reply["message"] and not site.store.votes(project)


def test_a_vote_sooner_than_anybody_can_look_says_how_long_to_wait(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts(), min_dwell_ms=60_000), site.browser()
    reply = browser.vote(project, browser.show(project))
    assert (reply["status"], reply["reason"]) == ("refused", "too_soon")
    assert 0 < reply["wait_ms"] <= 60_000


def test_choice_and_strength_turn_with_the_sides(tmp_path: Path) -> None:
    site = Site(tmp_path, seed=3)
    project, browser = site.project(texts(12), strength=True), site.browser()
    for _ in range(12):
        assert browser.vote(project, browser.show(project), "left", strength=-2)["status"] == "stored"
    votes = site.store.votes(project)
    assert {vote.order for vote in votes} == {(0, 1), (1, 0)}
    for vote in votes:
        assert (vote.choice, vote.strength) == (("a", -2) if vote.order == (0, 1) else ("b", 2))


def test_undo_tells_the_earlier_verdict_and_a_new_one_is_its_revision(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    judged = browser.show(project)
    browser.vote(project, judged, "right", rationale="clearer")
    reply = browser.post(f"/api/projects/{project}/undo", {}).json()
    current = reply["current"]
    assert reply["reopened"] and current["assignment"] == judged["assignment"] and current["revision"] == 2
    assert (current["earlier"]["choice"], current["earlier"]["rationale"]) == ("right", "clearer")
    browser.post(f"/api/projects/{project}/displayed", {"assignment": current["assignment"]})
    assert browser.vote(project, current, "tie")["status"] == "stored"
    assert [vote.choice for vote in site.store.votes(project)] == ["tie"]
    assert len(site.store.votes(project, latest=False)) == 2


def test_what_was_opened_again_can_be_left_as_it_was(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    following = browser.vote(project, browser.show(project))["current"]
    browser.post(f"/api/projects/{project}/undo", {})
    reply = browser.post(f"/api/projects/{project}/keep", {}).json()
    assert reply["current"]["assignment"] == following["assignment"]


def test_nobody_votes_on_what_another_was_shown(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project = site.project(texts())
    current = site.browser("ann").show(project)
    ben = site.browser("ben")
    assert ben.post(f"/api/projects/{project}/displayed", {"assignment": current["assignment"]}).json() == {"displayed": False}
    assert ben.vote(project, current)["reason"] == "not_yours"


def test_two_people_are_shown_different_items_where_one_vote_is_wanted(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project = site.project(texts(2))
    ann, ben = site.browser("ann").next(project), site.browser("ben").next(project)
    assert ann["current"] is not None and ann["ahead"] is not None
    assert ben["current"] is None and ben["ahead"] is None


def test_what_is_held_is_free_for_others_once_the_page_is_left(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project = site.project(texts(2))
    ann, ben = site.browser("ann"), site.browser("ben")
    ann.next(project)
    assert ann.post(f"/api/projects/{project}/release", {}).json() == {"released": 2}
    assert ben.next(project)["current"] is not None


def test_lists_are_ranked(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts(2, k=4)), site.browser()
    current = browser.show(project)
    body = {"assignment": current["assignment"], "revision": 1, "ranks": [2, 1, 3, 3]}
    assert browser.post(f"/api/projects/{project}/vote", body).json()["status"] == "stored"
    [vote] = site.store.votes(project)
    assert vote.ranks is not None
    assert [vote.ranks[place] for place in vote.order] == [2, 1, 3, 3]


def test_the_answer_of_a_calibration_item_is_told_after_the_vote_alone(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts(), calibration=1), site.browser()
    known = [row.__class__(**{**vars(row), "ranks": (2.0, 1.0)}) for row in texts(6)[5:]]
    site.store.add(project, known, role="calibration", explanations={"row-5": "the second one answers"})
    current = browser.show(project)
    assert current["calibration"] and "the second one answers" not in json.dumps(current)
    feedback = browser.vote(project, current, "tie")["feedback"]
    assert not feedback["right"] and feedback["explanation"] == "the second one answers"
    assert feedback["expected"]["choice"] in ("left", "right")


def test_a_closed_project_hands_nothing_out(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts()), site.browser()
    site.store.set_open(project, False)
    state = browser.next(project)
    assert state["current"] is None and not state["project"]["open"]


def test_instructions_are_html_without_scripts_and_reading_them_is_noted(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(texts(), guideline="# Rules\n<script>alert(1)</script> **kind**"), site.browser()
    guideline = browser.get(f"/api/projects/{project}/guideline").json()
    assert guideline["version"] == 1 and "<strong>kind</strong>" in guideline["html"] and "<script" not in guideline["html"]
    browser.post(f"/api/projects/{project}/guideline", {"version": 1})
    me = site.store.account("me")
    assert me is not None and site.store.progress(project, me.id).guideline_read == 1


def test_pictures_are_served_as_they_are_to_be_kept_for_ever(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(images(tmp_path), kind="image"), site.browser()
    source = browser.next(project)["current"]["candidates"][0]["media"][0]["src"]
    reply = browser.get(source)
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/png"
    assert reply.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert reply.content in [png(n) for n in range(6)]
    again = browser.get(source, if_none_match=reply.headers["etag"])
    assert again.status_code == 304 and not again.content and again.headers["etag"] == reply.headers["etag"]


@pytest.mark.parametrize(("wanted", "start", "end"), [("bytes=2-5", 2, 6), ("bytes=10-", 10, None), ("bytes=-4", -4, None)])
def test_part_of_a_file_is_served_where_a_player_seeks(tmp_path: Path, wanted: str, start: int, end: int | None) -> None:
    site = Site(tmp_path)
    project, browser = site.project(images(tmp_path), kind="image"), site.browser()
    source = browser.next(project)["current"]["candidates"][0]["media"][0]["src"]
    whole = browser.get(source).content
    part = browser.get(source, range=wanted)
    assert part.status_code == 206 and part.content == whole[start:end]
    assert part.headers["content-range"].endswith(f"/{len(whole)}")
    assert browser.get(source, range="bytes=999999-").status_code == 416


def test_a_picture_that_was_changed_is_not_served(tmp_path: Path) -> None:
    site = Site(tmp_path)
    project, browser = site.project(images(tmp_path), kind="image"), site.browser()
    source = browser.next(project)["current"]["candidates"][0]["media"][0]["src"]
    for file in tmp_path.glob("*.png"):
        file.write_bytes(png(99))
    reply = browser.get(source)
    assert reply.status_code == 410 and str(tmp_path) not in reply.text


def test_nothing_that_is_sent_to_an_annotator_names_a_model_a_file_or_a_seed(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    pictures, words = site.project(images(tmp_path), kind="image"), site.project(texts())
    browser, sent = site.browser("ann"), []
    for project in (pictures, words):
        current = browser.show(project)
        sent += [browser.get(media["src"]) for candidate in current["candidates"] for media in candidate["media"]]
        sent += [browser.get(f"/api/projects/{project}/next"), browser.get("/api/projects"), browser.get(f"/judge/{project}")]
        body = {"assignment": current["assignment"], "revision": 1, "choice": "left"}
        sent.append(browser.post(f"/api/projects/{project}/vote", body))
    told = b"".join(reply.content + repr(reply.headers).encode() + str(reply.url).encode() for reply in sent)
    for secret in (*MAKERS, "987654", str(tmp_path), "secret/folder", "row-"):
        assert secret.encode() not in told, secret


def test_the_judgements_are_exported_as_a_zipped_folder_with_its_card(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project = site.project(texts())
    ann = site.browser("ann")
    ann.vote(project, ann.show(project), "left")
    ann.vote(project, ann.show(project), "tie")
    reply = site.browser("rev").get(f"/api/projects/{project}/export?format=trl&container=jsonl")
    assert reply.headers["content-disposition"] == 'attachment; filename="project-0-trl.zip"'
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        names = archive.namelist()
        rows = archive.read("project-0-trl/train.jsonl").decode().splitlines()
    assert "project-0-trl/README.md" in names and len(rows) == 1 and {"chosen", "rejected"} <= json.loads(rows[0]).keys()
    assert ann.get(f"/api/projects/{project}/export").status_code == 403
    assert "format" in site.browser("rev").get(f"/api/projects/{project}/export?format=none").json()["detail"]


def test_conversations_with_a_picture_in_one_message_are_exported_and_read_again(tmp_path: Path) -> None:
    from mmalign.importers.trl import trl

    said = (Message(role="user", text="Look", images=(Media(data=png(1)),)), Message(role="assistant", text="A cat."))
    prompt = Content(messages=(*said, Message(role="user", text="Why?")))
    row = Comparison(id="r", prompt=prompt, candidates=(Content(text="because"), Content(text="no idea")))
    site = Site(tmp_path)
    project, browser = site.project([row]), site.browser()
    browser.vote(project, browser.show(project))
    reply = browser.get(f"/api/projects/{project}/export")
    assert reply.status_code == 200, reply.text
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        archive.extractall(tmp_path / "out")
    [file] = (tmp_path / "out").rglob("*.parquet")
    [entry] = trl(path=str(file)).dataset
    read = comparison(entry)
    assert [(one.role, one.text, len(one.images)) for one in read.prompt.messages] == [
        ("user", "Look", 1),
        ("assistant", "A cat.", 0),
        ("user", "Why?", 0),
    ]
    assert {one.words().strip() for one in read.candidates} == {"because", "no idea"}


def test_who_follows_a_link_to_what_cannot_be_gets_a_page_with_a_way_back(tmp_path: Path) -> None:
    browser = Site(tmp_path).browser()
    page = browser.get("/api/projects/7/export", accept="text/html,*/*")
    assert page.status_code == 404 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert 'href="/admin/"' in page.text and "no project has" in page.text
    bad = browser.get("/api/projects/1/export?min_votes=<script>", accept="text/html")
    assert bad.status_code == 422 and "<script>" not in bad.text.replace('<script src="/static/theme.js">', "")
    assert browser.get("/nothing/<b>", accept="text/html").status_code == 404
    assert browser.get("/nothing").json() == {"detail": "Not Found"}


def test_the_dashboard_counts_each_new_vote(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project = site.project(texts())
    ann, rev = site.browser("ann"), site.browser("rev")
    for count in (1, 2):
        ann.vote(project, ann.show(project), "left")
        with zipfile.ZipFile(io.BytesIO(rev.get(f"/api/projects/{project}/dashboard").content)) as archive:
            assert json.loads(archive.read("project-0-dashboard/dashboard.json"))["num_votes"] == count
    plot = rev.get(f"/api/projects/{project}/plots/choices.svg")
    assert plot.headers["content-type"].startswith("image/svg+xml") and plot.text.startswith("<svg ")
    assert rev.get(f"/api/projects/{project}/plots/nonsense.svg").status_code == 404
    assert ann.get(f"/api/projects/{project}/plots/choices.svg").status_code == 403


def test_a_backup_is_a_store_of_its_own_for_administrators_alone(tmp_path: Path) -> None:
    site = Site(tmp_path, team=True)
    project, ann = site.project(texts()), site.browser("ann")
    ann.vote(project, ann.show(project))
    assert ann.get("/api/backup").status_code == site.browser("rev").get("/api/backup").status_code == 403
    (tmp_path / "copy.db").write_bytes(site.browser("ada").get("/api/backup").content)
    copy = Store.open(str(tmp_path / "copy.db"))
    OPEN.append(copy)
    assert copy.votes(project) == site.store.votes(project)


def test_health_needs_no_sign_in_and_tells_nothing_else(tmp_path: Path) -> None:
    assert Site(tmp_path, team=True).browser().get("/health").json() == {"status": "ok"}


def test_projects_that_are_not_there_are_told_as_such(tmp_path: Path) -> None:
    browser = Site(tmp_path).browser()
    for path in ("/api/projects/7/next", "/api/projects/7/guideline", "/api/projects/7/export"):
        reply = browser.get(path)
        assert reply.status_code == 404 and "no project has" in reply.json()["detail"]
    assert browser.get(f"/api/projects/{10**30}/next").status_code == 422
