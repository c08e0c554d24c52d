"""The page's addresses: `/`, what it loads, `/events` that tells of changes, and `/state.json` for programs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from fl_server.dashboard.feed import Feed
from fl_server.dashboard.page import STATIC, lead, refusal, render, static
from fl_server.dashboard.snapshot import Snapshot
from icmoe.errors import IcmoeError

LOOK_S = 1.0
QUIET_S = 15.0
"""Seconds after which a comment keeps an idle connection open."""
RETRY_MS = 3000


def make_app(feed: Feed) -> FastAPI:
    """Return the app over a feed; nothing but reading is offered, and no page of FastAPI's own.

    Parameters
    ----------
    feed
        Where snapshots come from.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    def page(study: str = "") -> HTMLResponse:
        return HTMLResponse(render(feed.current(study)))

    @app.get("/state.json")
    def state(study: str = "") -> Response:
        return Response(feed.current(study).model_dump_json(indent=1) + "\n", media_type="application/json")

    @app.get("/events")
    async def stream(study: str = "") -> StreamingResponse:
        await run_in_threadpool(feed.current, study)  # an unknown study is refused before the stream begins
        return StreamingResponse(events(feed, study), media_type="text/event-stream")

    @app.get("/static/{name}")
    def loaded(name: str) -> Response:
        if name not in STATIC:
            raise HTTPException(404)
        return Response(static(name), media_type=STATIC[name])

    @app.exception_handler(IcmoeError)
    def refused(request: Request, error: IcmoeError) -> HTMLResponse:
        del request
        return HTMLResponse(refusal(error.faults[0]), 404)

    return app


async def events(feed: Feed, study: str) -> AsyncIterator[str]:
    """Yield the state at once and whenever it changed; the page then fetches itself anew. A study that goes away ends it.

    Parameters
    ----------
    feed, study
        What is shown.
    """
    yield f"retry: {RETRY_MS}\n\n"
    seen, quiet_s = "", 0.0
    while True:
        try:
            snapshot = await run_in_threadpool(feed.current, study)
        except IcmoeError:
            return
        if snapshot.etag != seen:
            seen, quiet_s = snapshot.etag, 0.0
            yield event(snapshot)
        elif quiet_s >= QUIET_S:
            quiet_s = 0.0
            yield ": nothing new\n\n"
        await asyncio.sleep(LOOK_S)
        quiet_s += LOOK_S


def event(snapshot: Snapshot) -> str:
    """Return a server-sent event: what the state is called, and where the study stands in a sentence."""
    told = json.dumps({"etag": snapshot.etag, "lead": lead(snapshot)})
    return f"id: {snapshot.etag}\nevent: state\ndata: {told}\n\n"
