"""The study page in a real Chromium: phone and desk width, light and dark, by keyboard, live, without a script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import ABSENT, CHROMIUM, DRIVER, ENTER, TAB, Browser, browsing, until
from PIL import Image
from shown import NAMES, living, make_home, play, serving, with_infinities

from fl_server.home import Home
from fl_server.submit import StudyFolder
from fl_server.waiting import begun, write_wait

pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=ABSENT)

ROUNDS = 12
LONG = "A-hospital-with-a-long-name-2026"
SITES = (*NAMES, LONG)
SCHEMES = ("light", "dark")
# Relative luminance and contrast as WCAG 2.2 defines them, of every text against what is painted below it.
POOR = """
const dot = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const seen = (colour) => {
  dot.clearRect(0, 0, 1, 1);
  dot.fillStyle = colour;
  dot.fillRect(0, 0, 1, 1);
  return [...dot.getImageData(0, 0, 1, 1).data];
};
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const below = (node) => {
  for (let found = node; found; found = found.parentElement) {
    const colour = seen(getComputedStyle(found).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
const poor = [];
for (const node of document.querySelectorAll('body *')) {
  const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  const box = node.getBoundingClientRect();
  if (!text || box.width < 2 || box.bottom < 0) continue;
  const style = getComputedStyle(node);
  const [a, b] = [light(seen(node.closest('svg') ? style.fill : style.color)), light(below(node))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) poor.push(`${node.tagName} ${node.className} ${contrast.toFixed(2)} ${node.textContent.trim()}`);
}
return poor;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return make_home(tmp_path_factory.mktemp("page") / "home", *SITES)


@pytest.fixture(scope="module")
def folder(home: Home, make_study) -> Iterator[StudyFolder]:
    """A run that lives and waits for two sites in its seventh round."""
    study = make_study(rounds=ROUNDS, quorum=2, deadline_s=1800.0)
    made = play(home, study, rounds=6, names=SITES, answer=with_infinities("Cedar", 3))
    write_wait(
        made.study, begun("answers", "round 7 of 12", 7, 1800.0, SITES, asked=SITES[1:], offline=SITES[:1]).with_answer(LONG)
    )
    with living(made):
        yield made


@pytest.fixture(scope="module")
def address(home: Home, folder: StudyFolder) -> Iterator[str]:
    with serving(home) as (found, _):
        yield found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width_px", [390, 1280])
def test_the_page_fits_and_reads_at_phone_and_desk_width(
    width_px: int, scheme: str, browser: Browser, address: str, tmp_path: Path
) -> None:
    browser.resize(width_px, scheme=scheme, mobile=width_px < 500)
    browser.open(address)
    browser.wait("document.getElementById('link').textContent.startsWith('Live')", "the first event")
    assert browser.run("return document.documentElement.scrollWidth") <= width_px, "it scrolls sideways"
    # A region that is wider than the screen scrolls by itself and is reached by the keyboard.
    outside = f"[...document.querySelectorAll('main *')].filter((n) => n.getBoundingClientRect().right > {width_px})"
    assert browser.run(f"return {outside}.filter((n) => !n.closest('.scroll[tabindex=\"0\"]')).map((n) => n.outerHTML)") == []
    assert browser.run(POOR) == []
    wide = (
        "[...document.querySelectorAll('tbody th')].filter((n) => n.getBoundingClientRect().width < 80).map((n) => n.textContent)"
    )
    assert browser.run(f"return {wide}") == []
    picture = tmp_path / "page.png"
    browser.picture(picture)
    corner = Image.open(picture).convert("L").getpixel((2, 2))
    assert corner < 64 if scheme == "dark" else corner > 192
    assert browser.complaints() == []


def test_everything_is_reached_and_seen_by_keyboard(browser: Browser, address: str) -> None:
    browser.resize(390, scheme="light", mobile=True)
    browser.open(address)
    browser.press(TAB)
    assert browser.run("return document.activeElement.className") == "skip"
    assert browser.run("return document.activeElement.getBoundingClientRect().top >= 0")
    browser.press(ENTER)
    assert browser.run("return document.activeElement.id") == "main"
    browser.open(address)
    browser.wait("document.getElementById('link').textContent.startsWith('Live')", "the first event")
    all_of_it = "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].filter((n) => n.checkVisibility())"
    wanted = browser.run(f"const all = [...document.querySelectorAll('*')]; return {all_of_it}.map((n) => all.indexOf(n))")
    reached, unseen = [], []
    for _ in wanted:
        browser.press(TAB)
        place, outline = browser.run(
            "const n = document.activeElement; const s = getComputedStyle(n);"
            "return [[...document.querySelectorAll('*')].indexOf(n), `${s.outlineStyle} ${s.outlineWidth}`]"
        )
        reached.append(place)
        unseen += [place] if outline != "solid 3px" else []
    assert reached == wanted
    assert len(wanted) > 15
    assert unseen == []


def told(browser: Browser) -> list[tuple[str, str]]:
    """Role and name of each node that a screen reader meets; none while Chromium, which makes this tree late, has its root."""
    nodes = browser.developer("Accessibility.getFullAXTree")["nodes"]
    spoken = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]
    return spoken if any(role == "contentinfo" for role, _ in spoken) else []


def test_headings_landmarks_and_tables_are_in_order_for_a_screen_reader(browser: Browser, address: str) -> None:
    browser.open(address)
    spoken = until(lambda: told(browser), "the tree of what a screen reader is told", 20)
    roles = [role for role, _ in spoken]
    assert {"banner", "navigation", "main", "contentinfo", "status", "progressbar"} <= set(roles)
    assert [name for role, name in spoken if role == "heading"][:3] == ["tiny running", "At a glance", "Sites"]
    assert all(name for role, name in spoken if role in {"region", "link", "navigation", "progressbar"})
    assert roles.count("figure") == 2 * len(SITES)
    assert not {"image", "img", "graphics-document", "SvgRoot"} & set(roles)  # each plot is told in words


def test_a_change_appears_by_itself_and_leaves_focus_and_open_tables_alone(
    browser: Browser, address: str, folder: StudyFolder
) -> None:
    browser.resize(1280)
    browser.open(address)
    browser.wait("document.getElementById('link').textContent.startsWith('Live')", "the first event")
    browser.run(
        "document.querySelector('#dice-numbers summary').click(); document.querySelector('#dice-numbers summary').focus()"
    )
    browser.run("window.kept = true")
    assert "Birch, Cedar" in browser.run("return document.getElementById('lead').textContent")
    wait = begun("answers", "round 7 of 12", 7, 1800.0, SITES, asked=SITES[1:], offline=SITES[:1])
    write_wait(folder.study, wait.with_answer(LONG).with_answer("Birch"))
    browser.wait("!document.getElementById('lead').textContent.includes('Birch')", "the answer of Birch")
    assert "has answered" in browser.run(
        "return [...document.querySelectorAll('tr')].find((r) => r.innerText.startsWith('Birch')).innerText"
    )
    assert browser.run("return window.kept") is True  # the page was not loaded anew
    assert browser.run("return document.getElementById('dice-numbers').open") is True
    assert browser.run("return document.activeElement.tagName") == "SUMMARY"
    left = browser.run("return document.querySelector('#sites-scroll .left').textContent")
    assert re.fullmatch(r"\(in \d+ min \d+ s\)", left)
    until(
        lambda: browser.run("return document.querySelector('#sites-scroll .left').textContent") != left, "the clock to go on", 10
    )
    assert browser.complaints() == []


def test_a_page_whose_server_went_says_so(browser: Browser, home: Home, folder: StudyFolder) -> None:
    with serving(home) as (address, _):
        browser.open(address)
        browser.wait("document.getElementById('link').textContent.startsWith('Live')", "the first event")
    browser.wait("document.getElementById('link').classList.contains('lost')", "the loss to be said")
    assert "lost" in browser.run("return document.getElementById('link').textContent")


def test_without_a_script_the_page_reloads_itself(home: Home, folder: StudyFolder, address: str, tmp_path: Path) -> None:
    with browsing(tmp_path, script=False) as plain:
        plain.open(address)
        source = until(lambda: plain.ask("GET", "/source"), "the page, which may be between two loads", 20.0)
    assert "This page reloads itself every 15 seconds." in source
    assert '<meta http-equiv="refresh" content="15">' in source.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')


def test_the_printed_address_lets_a_browser_in_and_the_token_leaves_the_address(browser: Browser, home: Home, folder) -> None:
    with serving(home, "--token") as (address, _):
        page, _, token = address.partition("?")
        browser.open(page)
        assert "ICM522" in browser.run("return document.body.innerText")
        browser.open(address)
        browser.wait("document.getElementById('link')?.textContent.startsWith('Live')", "the first event")
        assert browser.run("return location.href") == page
        assert token.partition("=")[2] not in browser.run("return document.documentElement.outerHTML + document.cookie")


def test_hostile_names_run_nothing(browser: Browser, make_study, tmp_path: Path) -> None:
    evil = ("<script>window.hit = 1</script>", "<img src=x onerror='window.hit = 2'>", "Alder")
    home = make_home(tmp_path / "home", "Alder")
    made = play(home, make_study(rounds=4, quorum=2), rounds=2, names=evil)
    with serving(home) as (address, _), living(made):
        browser.open("about:blank")
        browser.complaints()  # of pages before, whose server is gone
        browser.open(address)
        browser.wait("document.getElementById('link').textContent.startsWith('Live')", "the first event")
        write_wait(made.study, begun("answers", "round 3 of 4", 3, 60.0, evil, asked=evil))
        browser.wait("document.getElementById('lead').textContent.includes('onerror')", "the name as text")
        assert browser.run("return window.hit ?? null") is None
        assert browser.complaints() == []


def test_the_first_study_and_a_newer_one_appear_by_themselves(browser: Browser, make_study, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", *NAMES)
    title = "document.querySelector('h1').textContent"
    with serving(home) as (address, _):
        browser.open(address)
        assert "No study yet" in browser.run(f"return {title}")
        first = play(home, make_study(name="first", rounds=4, quorum=2), rounds=1)
        browser.wait(f"{title}.startsWith('first')", "the first study")
        play(home, make_study(name="second", rounds=4, quorum=2), rounds=1)
        browser.wait(f"{title}.startsWith('second')", "the newer study")
        browser.run("document.querySelector('nav[aria-label=Studies] a:not([aria-current])').click()")
        browser.wait(f"{title}.startsWith('first') && location.search.includes('{first.path.name}')", "the older study")
