"""Who is let in to the study page, by which names and which token, what a browser is told, and the page as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import consortium
import httpx
import pytest
from consortium import serve
from shown import NAMES, make_home, play, serving

from fl_server.dashboard.app import events, make_app
from fl_server.dashboard.door import HEADERS, LOOPBACK, Door
from fl_server.dashboard.feed import Feed
from fl_server.dashboard.page import STATIC
from fl_server.dashboard.serve import bound
from fl_server.home import Home

TOKEN = "right-token"
ANSWER_S = 60.0


@pytest.fixture(scope="module")
def home(make_study, tmp_path_factory) -> Home:
    found = make_home(tmp_path_factory.mktemp("page") / "home")
    play(found, make_study(rounds=4, quorum=2), rounds=2)
    return found


class Asked:
    """A client that keeps cookies and follows nothing, in front of a door, without a socket between them."""

    def __init__(self, door: Door, base_url: str = "http://127.0.0.1:8765") -> None:
        self.door, self.base_url, self.cookies = door, base_url, httpx.Cookies()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            over = httpx.ASGITransport(app=self.door)
            async with httpx.AsyncClient(transport=over, base_url=self.base_url, cookies=self.cookies) as http:
                answer = await http.request(method, path, **options)
                self.cookies = http.cookies
                return answer

        return asyncio.run(ask())


def client(home: Home, *, token: str | None = None, any_address: bool = False) -> Asked:
    names = {*LOOPBACK, "page.example"}
    return Asked(Door(make_app(Feed(home)), names=names, any_address=any_address, token=token, port=8765, secure=False))


FOUND = ("/", "/state.json", "/static/style.css", "/static/live.js", "/static/icon.svg")
PATHS = (*FOUND, "/static/page.py", "/static/%2e%2e%2fpage.py", "/docs", "/openapi.json", "/?study=no")


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_carries_the_policy_and_is_not_kept(path: str, home: Home) -> None:
    answer = client(home).get(path)
    assert answer.status_code == (200 if path in FOUND else 404)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading_is_offered(method: str, home: Home) -> None:
    assert client(home).request(method, "/").status_code == 405


@pytest.mark.parametrize(
    ("host", "own", "at_any_address"),
    [
        ("127.0.0.1:8765", True, True),
        ("localhost", True, True),
        ("LOCALHOST.:1", True, True),
        ("[::1]:8765", True, True),
        ("page.example", True, True),
        ("10.1.2.3:8765", False, True),
        ("[fe80::1]", False, True),
        ("evil.example", False, False),
        ("127.0.0.1.evil.example:8765", False, False),
        ("localhost.evil.example", False, False),
        ("localhost@evil.example", False, False),
        ("evil.example#localhost", False, False),
        ("[localhost]", False, False),
        ("", False, False),
        ("localhost:port", False, False),
        ("localhost, evil.example", False, False),
    ],
)
def test_a_foreign_name_that_was_made_to_point_here_is_refused(host: str, own: bool, at_any_address: bool, home: Home) -> None:
    for any_address, expected in ((False, own), (True, at_any_address)):
        answer = client(home, any_address=any_address).get("/state.json", headers={"Host": host})
        assert answer.status_code == (200 if expected else 421)
        assert ("ICM521" in answer.text) is not expected
        assert expected or "tiny" not in answer.text


def test_two_names_in_one_question_are_refused(home: Home) -> None:
    headers = httpx.Headers([("Host", "localhost"), ("Host", "evil.example")])
    assert client(home).get("/", headers=headers).status_code == 421


def test_a_token_is_asked_for_compared_whole_and_becomes_a_cookie(home: Home) -> None:
    asked = client(home, token=TOKEN)
    for path in (*PATHS, "/events", f"/?token={TOKEN}x", f"/?token={TOKEN[:-1]}", "/?token=", f"/?token=x&token={TOKEN}"):
        refused = asked.get(path)
        assert refused.status_code == 403, path
        assert "ICM522" in refused.text
        assert not {"tiny", TOKEN} & set(refused.text.split())
        assert "set-cookie" not in refused.headers
        assert refused.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
    let_in = asked.get(f"/?token={TOKEN}&study=tiny")
    assert (let_in.status_code, let_in.headers["Location"]) == (303, "/?study=tiny")
    cookie = let_in.headers["Set-Cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=lax", "path=/", "icmoe-page-8765="))
    assert "domain" not in cookie
    page = asked.get("/")  # the client keeps the cookie
    assert page.status_code == 200
    assert TOKEN not in page.text


def test_a_program_shows_the_token_in_a_header(home: Home) -> None:
    asked = client(home, token=TOKEN)
    assert asked.get("/state.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()["study"] == "tiny"
    for wrong in (f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", "Bearer \u00e9"):
        assert asked.get("/state.json", headers={"Authorization": wrong.encode("latin-1")}).status_code == 403


def test_the_way_on_after_the_token_never_leads_elsewhere(home: Home) -> None:
    for path in ("//evil.example", "/%2F%2Fevil.example", "///evil.example/x", "/\\evil.example"):
        answer = client(home, token=TOKEN).get(f"http://127.0.0.1:8765{path}?token={TOKEN}")
        assert answer.status_code == 303
        assert not answer.headers["Location"].startswith(("//", "/\\", "http"))


def test_a_cookie_over_tls_is_for_tls_only(home: Home) -> None:
    door = Door(make_app(Feed(home)), names=LOOPBACK, any_address=True, token=TOKEN, port=1, secure=True)
    answer = Asked(door, "https://127.0.0.1").get(f"/?token={TOKEN}")
    assert "secure" in answer.headers["Set-Cookie"].lower()


def test_state_json_is_the_snapshot(home: Home) -> None:
    found = client(home).get("/state.json").json()
    assert (found["study"], found["rounds_done"], found["phase"]) == ("tiny", 2, "not running")
    assert [site["name"] for site in found["sites"]] == list(NAMES)


def test_everything_that_the_page_loads_is_part_of_the_package() -> None:
    table = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "fl_server.dashboard" in table["packages"]
    folder = Path(str(files("fl_server.dashboard")))
    shipped = {path for pattern in table["package-data"]["fl_server.dashboard"] for path in folder.glob(pattern)}
    assert shipped == {path for part in ("templates", "static") for path in (folder / part).iterdir()}
    assert {path.name for path in (folder / "static").iterdir()} == set(STATIC)
    text = "".join(path.read_text() for path in shipped)
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")  # nothing from elsewhere


def events_of(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_events_of_a_study_that_goes_away_end_without_a_word(make_study, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    folder = play(home, make_study(rounds=4, quorum=2), rounds=1)

    async def told() -> list[str]:
        found = []
        async for word in events(Feed(home), folder.path.name):
            found.append(word)
            folder.study.unlink(missing_ok=True)
        return found

    first, *rest = asyncio.run(asyncio.wait_for(told(), 30))
    assert first.startswith("retry: ")
    assert rest == []


def test_events_tell_at_once_and_after_each_round_and_the_process_ends_when_told(make_study, tmp_path: Path) -> None:
    home, study = make_home(tmp_path / "home"), make_study(rounds=4, quorum=2)
    play(home, study, rounds=1)
    with serving(home) as (address, process), httpx.Client(base_url=address, timeout=ANSWER_S, trust_env=False) as asked:
        assert address.startswith("http://127.0.0.1:")
        assert "token" not in address
        with asked.stream("GET", "/events") as stream:
            assert stream.headers["Content-Type"].startswith("text/event-stream")
            assert stream.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
            told = events_of(stream)
            first = next(told)
            assert f'data-etag="{first["etag"]}"' in asked.get("/").text
            play(home, study, rounds=2)
            second = next(told)
            while "2 of 4" not in second["lead"]:
                second = next(told)
            assert second["etag"] != first["etag"]
        assert asked.get("/", headers={"Host": "evil.example"}).status_code == 421
        assert "server" not in asked.get("/").headers
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert (home.root / "page.log").read_text() == ""


def test_beyond_loopback_it_is_tls_and_a_token_that_is_printed_once_and_never_logged(make_study, tmp_path: Path) -> None:
    home = consortium.make_home(tmp_path / "home", *NAMES)
    play(home, make_study(rounds=4, quorum=2), rounds=1)
    with serving(home, "--host", "0.0.0.0") as (printed, process):
        address, _, token = printed.partition("/?token=")
        port = address.rpartition(":")[2]
        assert printed.startswith("https://127.0.0.1:")  # the first name of its certificate
        trust = ssl.create_default_context(cafile=str(home.ca))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=ANSWER_S, trust_env=False) as asked:
            assert asked.get("/").status_code == 403
            assert asked.get(f"/?token={token}").status_code == 303
            assert "tiny" in asked.get("/").text
            assert asked.get("/", headers={"Host": "evil.example"}).status_code == 421
        process.terminate()
        process.wait(timeout=30)
        assert token not in process.stdout.read()
    assert token not in (home.root / "page.log").read_text()
    assert len(token) >= 43


def test_two_starts_have_two_tokens(home: Home) -> None:
    with serving(home, "--token") as (first, _), serving(home, "--token") as (second, _):
        tokens = [address.partition("/?token=")[2] for address in (first, second)]
    assert all(tokens)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("other",), "ICM524 other: study has no folder here (allowed: tiny-"),
        (("--results", "nowhere.json"), "ICM523 nowhere.json"),
        (("--host", "no.such.host.invalid"), "ICM202 --host"),
        (("--host", "192.0.2.1"), "ICM202 --host and --port"),
        (("--port", "70000"), "ICM202"),
        (("--host", "0.0.0.0", "--port", "0"), "ICM326"),
    ],
    ids=["study", "results", "name", "address", "port", "no certificate"],
)
def test_what_cannot_be_started_is_one_numbered_sentence(words: tuple[str, ...], said: str, home: Home) -> None:
    code, output = serve("dashboard", "--home", home.root, *words)
    assert code != 0
    assert said in output.replace("\n", " ")


def test_a_port_in_use_is_named(home: Home) -> None:
    with bound("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        code, output = serve("dashboard", "--home", home.root, "--port", port)
    assert code == 1
    assert f"ICM329 port is in use: 127.0.0.1:{port}. Nothing was started. Choose another --port." in output.replace("\n", " ")


def test_loopback_alone_is_listened_on_unless_told_otherwise(home: Home) -> None:
    with serving(home) as (address, _):
        port = int(address.rstrip("/").rpartition(":")[2])
        mine = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for other in mine - {"127.0.0.1"}:
            if not other.startswith("127."):
                with pytest.raises(OSError), socket.create_connection((other, port), timeout=5):  # noqa: PT011  (any refusal)
                    pass
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
        assert listening == [f"0100007F:{port:04X}"]
