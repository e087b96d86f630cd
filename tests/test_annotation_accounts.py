"""Accounts: passwords that are never told, roles, sessions that outlive a restart and end, sign-ins that get slower."""

import logging
import threading
from collections.abc import Callable

import pytest
from annotation_stores import Clock, clock, new_url, passwords_cost_little, postgres, store
from sqlalchemy import text

from mmalign.annotation.accounts import LONGEST_WAIT_S, fits, hash_password
from mmalign.annotation.store import Store
from mmalign.errors import UserError

FIXTURES = (clock, new_url, passwords_cost_little, postgres, store)
PASSWORD = "correct horse battery"
DUMPED = ("annotator", "session", "throttle", "event")


def dump(store: Store) -> str:
    with store.database.read() as connection:
        return "\n".join(str(row) for name in DUMPED for row in connection.execute(text(f"SELECT * FROM {name}")))


def test_a_password_signs_in_and_another_does_not(store: Store) -> None:
    ann = store.add_account("Ann", PASSWORD, "reviewer")
    good = store.sign_in(" ann ", PASSWORD)
    assert (good.status, good.account) == ("ok", ann) and store.session(good.token) == ann
    for name, password in (("Ann", PASSWORD + "!"), ("Ann", ""), ("Bob", PASSWORD), ("Ann", PASSWORD.upper())):
        bad = store.sign_in(name, password)
        assert (bad.status, bad.account, bad.token) == ("wrong", None, "")
    assert store.session("") is None and store.session(good.token + "x") is None


def test_an_account_without_a_password_cannot_be_signed_in_to(store: Store) -> None:
    local = store.add_account("local", role="admin")
    for password in ("", "None", "null"):
        assert store.sign_in("local", password, address=password).status == "wrong"
    assert store.session(store.open_session(local.id)) == local


def test_roles_may_what_lower_roles_may(store: Store) -> None:
    low, middle, high = (store.add_account(f"person {role}", role=role) for role in ("annotator", "reviewer", "admin"))
    assert [account.may("reviewer") for account in (low, middle, high)] == [False, True, True]
    assert [account.may("admin") for account in (low, middle, high)] == [False, False, True]
    assert [account.name for account in store.accounts()] == ["person admin", "person annotator", "person reviewer"]


def test_a_session_outlives_a_restart_and_ends_in_time(new_url: Callable[[], str], clock: Clock) -> None:
    url = new_url()
    store = Store.open(url, clock=clock)
    ann = store.add_account("Ann", PASSWORD)
    token = store.sign_in("Ann", PASSWORD, hours=2).token
    store.close()
    store = Store.open(url, clock=clock)
    clock.now += 2 * 3600 - 1
    assert store.session(token) == ann
    clock.now += 1
    assert store.session(token) is None
    other = store.open_session(ann.id)
    store.sign_out(other)
    assert store.session(other) is None
    store.close()


@pytest.mark.usefixtures("passwords_cost_little")
def test_a_new_password_or_a_closed_account_ends_all_sessions(store: Store) -> None:
    ann = store.add_account("Ann", PASSWORD)
    tokens = [store.sign_in("Ann", PASSWORD).token for _ in range(2)]
    store.change_account(ann.id, role="admin")
    assert store.session(tokens[0]).role == "admin"
    store.change_account(ann.id, password="another one altogether")
    assert [store.session(token) for token in tokens] == [None, None]
    assert store.sign_in("Ann", PASSWORD).status == "wrong"
    token = store.sign_in("Ann", "another one altogether").token
    closed = store.change_account(ann.id, active=False)
    assert not closed.may("annotator") and store.session(token) is None
    assert store.sign_in("Ann", "another one altogether").status == "wrong"


@pytest.mark.usefixtures("passwords_cost_little")
def test_who_fails_often_waits_longer_and_longer(store: Store, clock: Clock) -> None:
    store.add_account("Ann", PASSWORD)
    assert [store.sign_in("Ann", "wrong", address="a").status for _ in range(5)] == ["wrong"] * 5
    waits = []
    for _ in range(4):
        told = store.sign_in("Ann", PASSWORD, address="a")  # the right one is not looked at either
        assert told.status == "wait"
        waits.append(told.wait_s)
        clock.now += told.wait_s
        assert store.sign_in("ANN", "wrong", address="a").status == "wrong"
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert store.sign_in("Ann", PASSWORD, address="b").status == "ok", "somebody else's guessing does not lock a person out"
    clock.now += LONGEST_WAIT_S
    assert store.sign_in("Ann", PASSWORD, address="a").status == "ok"
    assert store.sign_in("Ann", "wrong", address="a").status == "wrong"


@pytest.mark.usefixtures("passwords_cost_little")
def test_an_address_that_tries_many_names_waits_even_if_one_of_them_is_its_own(store: Store) -> None:
    store.add_account("mine", PASSWORD)
    for n in range(20):
        assert store.sign_in(f"name {n}", "guess", address="a").status == "wrong"
        if n in (8, 16):
            assert store.sign_in("mine", PASSWORD, address="a").status == "ok"
    assert store.sign_in("name 20", "guess", address="a").status == "wait"


def test_tries_at_the_same_time_count_before_they_are_looked_at(store: Store) -> None:
    store.add_account("Ann", PASSWORD)
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.sign_in("Ann", "wrong").status)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["wait"] * 7 + ["wrong"] * 5


def test_passwords_and_tokens_are_nowhere_in_the_store_nor_in_a_log(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ann = store.add_account("Ann", PASSWORD)
        signed = store.sign_in("Ann", PASSWORD)
        store.sign_in("Ann", "a secret mistyped")
        store.change_account(ann.id, password="another one altogether")
        store.sign_in("Ann", "another one altogether")
        with pytest.raises(UserError) as told:
            store.add_account("Bob", "secret7")
    everything = dump(store) + caplog.text + repr(signed) + str(told.value) + "".join(map(str, store.events()))
    for secret in (PASSWORD, signed.token, "a secret mistyped", "another one altogether", "secret7"):
        assert secret not in everything


def test_a_password_is_hashed_with_a_salt_of_its_own() -> None:
    one, two = hash_password(PASSWORD), hash_password(PASSWORD)
    assert one != two and one.startswith("scrypt$32768$8$3$")
    assert fits(PASSWORD, one) and fits(PASSWORD, two) and not fits(PASSWORD + " ", one)


@pytest.mark.parametrize(
    ("name", "password", "role", "told"),
    [
        ("ann", PASSWORD, "annotator", "taken"),
        ("", PASSWORD, "annotator", "visible characters"),
        ("a\nb", PASSWORD, "annotator", "visible characters"),
        ("bob", "short", "annotator", "at least 10"),
        ("bob the builder", "Bob the Builder", "annotator", "password is the name"),
    ],
)
def test_accounts_that_cannot_be_are_refused(store: Store, name: str, password: str, role: str, told: str) -> None:
    store.add_account("Ann")
    with pytest.raises(UserError, match=told):
        store.add_account(name, password, role)
    assert len(store.accounts()) == 1


@pytest.mark.usefixtures("passwords_cost_little")
def test_a_clock_that_is_set_back_makes_nobody_wait_longer(store: Store, clock: Clock) -> None:
    store.add_account("Ann", "correct horse battery")
    for _ in range(6):
        answer = store.sign_in("Ann", "wrong")
    assert answer.status == "wait"
    clock.now -= 3600
    assert 0 < store.sign_in("Ann", "wrong").wait_s <= 1.0
