// Keeps the page as new as the coordinator's files: an event says that something changed, the page is fetched, and the parts
// that differ are put in place. Without events it is fetched every few seconds; without a script it reloads itself.
"use strict";

const body = document.body;
const link = document.getElementById("link");
const reloadMs = 1000 * Number(body.dataset.reload);
let etag = body.dataset.etag;
let clockLeadMs = Date.parse(body.dataset.now) - Date.now();
let fetching = false;
let stale = false;

function say(text, lost) {
  if (link.textContent !== text) link.textContent = text;
  link.classList.toggle("lost", Boolean(lost));
}

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const hours = Math.floor(whole / 3600);
  return hours < 48 ? `${hours} h ${Math.floor((whole % 3600) / 60)} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function tick() {
  for (const span of document.querySelectorAll("[data-moment]")) {
    const seconds = (Date.parse(span.dataset.moment) - Date.now() - clockLeadMs) / 1000;
    if (span.dataset.plain) span.textContent = seconds > 0 ? duration(seconds) : "longer than reckoned";
    else span.textContent = seconds >= 0 ? `(in ${duration(seconds)})` : `(${duration(-seconds)} ago)`;
  }
}

function put(old, fresh) {
  const open = new Set([...old.querySelectorAll("details[open]")].map((found) => found.id));
  const scrolled = [...old.querySelectorAll(".scroll[id]")].map((found) => [found.id, found.scrollLeft]);
  const focused = old.contains(document.activeElement) ? document.activeElement.closest("[id]") : null;
  const summary = focused !== null && document.activeElement.tagName === "SUMMARY";
  old.replaceWith(fresh);
  for (const found of fresh.querySelectorAll("details")) found.open = open.has(found.id);
  for (const [id, left] of scrolled) {
    const found = document.getElementById(id);
    if (found !== null) found.scrollLeft = left;
  }
  const again = focused !== null ? document.getElementById(focused.id) : null;
  if (again !== null) (summary ? again.querySelector("summary") : again).focus({ preventScroll: true });
}

function show(page) {
  const parts = (root) => new Map([...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
  const old = parts(document);
  const fresh = parts(page);
  if (body.dataset.folder !== page.body.dataset.folder || [...old.keys()].join() !== [...fresh.keys()].join()) {
    location.reload(); // another study, or another kind of page, such as the first one of a study
    return;
  }
  for (const [name, part] of fresh) if (!old.get(name).isEqualNode(part)) put(old.get(name), part);
  for (const id of ["lead", "phase"]) {
    const [mine, theirs] = [document.getElementById(id), page.getElementById(id)];
    if (mine.textContent !== theirs.textContent) mine.textContent = theirs.textContent;
    mine.className = theirs.className;
  }
  document.title = page.title;
  Object.assign(body.dataset, page.body.dataset);
  etag = page.body.dataset.etag;
  clockLeadMs = Date.parse(page.body.dataset.now) - Date.now();
  tick();
}

async function refresh() {
  if (fetching) {
    stale = true;
    return;
  }
  fetching = true;
  try {
    const answer = await fetch(location.pathname + location.search, { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    show(new DOMParser().parseFromString(await answer.text(), "text/html"));
  } catch {
    say("The coordinator's page cannot be reached; it is tried again.", true);
  } finally {
    fetching = false;
  }
  if (stale) {
    stale = false;
    refresh();
  }
}

function listen() {
  const source = new EventSource("/events" + location.search);
  source.addEventListener("state", (event) => {
    say("Live: changes appear by themselves.");
    if (JSON.parse(event.data).etag !== etag) refresh();
  });
  source.addEventListener("error", () => {
    say("The connection to the coordinator's page is lost; it is tried again.", true);
    if (source.readyState === EventSource.CLOSED) {
      setTimeout(() => {
        refresh();
        listen();
      }, reloadMs);
    }
  });
}

tick();
setInterval(tick, 1000);
if ("EventSource" in window) {
  listen();
} else {
  say(`This page fetches itself every ${reloadMs / 1000} seconds.`);
  setInterval(refresh, reloadMs);
}
