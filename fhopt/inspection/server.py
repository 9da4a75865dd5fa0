"""`fhopt view`: the report and the progress of a running fit in a browser, on this machine only.

It listens on 127.0.0.1 only. Other sites cannot access it: requests with another Host are refused (which stops DNS
rebinding), and no answer allows another origin.

    /             the report; while there is none, the progress
    /progress     the progress of the fit that creates the plan
    /progress.json
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError
from fhopt.inspection import html_report
from fhopt.inspection.optional import need
from fhopt.inspection.progress_file import RUNNING, beside, read_progress
from fhopt.plan.plan_files import PLAN_FILES

HOST = "127.0.0.1"
REASON = 300  # max characters of the reason on the page
HEADERS = {
    "Content-Security-Policy": html_report.POLICY + "; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Make = Callable[[bool], str]  # (is there a plan?) -> the page


@dataclass
class Viewer:
    """State of the server. make: builds the page, slowly. plan: its folder, which may be written meanwhile."""

    make: Make
    plan: Path | None = None
    page: str = ""
    failure: str = ""
    made_for: float = -1.0  # modification time of the plan that the page shows
    lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> None:
        """Rebuild the page if the plan has changed; not while a fit is running, nor twice at once."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            written = self.written()
            if self.is_fitting() or (self.plan is not None and written == 0.0) or written == self.made_for:
                return
            try:
                self.page, self.failure = self.make(written > 0.0), ""
            except FhoptError as error:
                self.failure = str(error)
            except Exception as error:  # shown on the page
                reason = " ".join(str(error).split())[:REASON]
                self.failure = (
                    f"the report could not be built ({type(error).__name__}: {reason}). Run `fhopt report` "
                    "with the same arguments to see where."
                )
            self.made_for = written
        finally:
            self.lock.release()

    def is_fitting(self) -> bool:
        """Return whether a running fit writes its progress for the plan."""
        result = read_progress(beside(self.plan)) if self.plan is not None else None
        return result is not None and result.state == RUNNING

    def written(self) -> float:
        """Return when the plan was written, seconds since 1970; 0 if there is none."""
        if self.plan is None:
            return 0.0
        with contextlib.suppress(OSError):
            return (self.plan / PLAN_FILES[0]).stat().st_mtime
        return 0.0

    def state(self) -> dict[str, Any]:
        """Return the content of /progress.json."""
        result = read_progress(beside(self.plan)) if self.plan is not None else None
        is_stale = self.made_for != self.written()
        is_making = not self.failure and is_stale and (self.plan is None or self.written() > 0.0)
        return {
            "plan": str(self.plan or ""),
            "ready": bool(self.page) and not is_stale,
            "making": is_making and not self.is_fitting(),
            "failure": self.failure,
            "fit": result.as_json() if result else None,
        }


def check_server_packages() -> None:
    """Raise FhoptError if a package that `fhopt view` needs is not installed."""
    for module in ("starlette", "uvicorn"):
        need(module, "fhopt view", "view")


def application(viewer: Viewer) -> Any:
    """Build the ASGI application. Raises FhoptError if starlette is not installed."""
    need("starlette", "fhopt view", "view")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    waiting = html_report.template("progress.html").render(
        policy=HEADERS["Content-Security-Policy"].split("; frame")[0]
    )

    def begin() -> None:
        threading.Thread(target=viewer.refresh, daemon=True).start()

    def main(request: Request) -> Response:
        begin()
        return HTMLResponse(viewer.page or waiting, headers=HEADERS)

    def progress(request: Request) -> Response:
        return HTMLResponse(waiting, headers=HEADERS)

    def state(request: Request) -> Response:
        begin()
        return JSONResponse(viewer.state(), headers=HEADERS)

    routes = [Route("/", main), Route("/progress", progress), Route("/progress.json", state)]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


def listen(port: int = 0) -> socket.socket:
    """Open a socket on 127.0.0.1; port 0 means any free port. Raises FhoptError if the port is taken."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()  # from now on, connections queue until served
    except OSError as error:
        listening.close()
        raise FhoptError(f"port {port} is unusable: {error.strerror}. Choose another --port, or drop it.") from error
    return listening


def serve_report(viewer: Viewer, listening: socket.socket) -> None:
    """Serve until the process is interrupted."""
    uvicorn = need("uvicorn", "fhopt view", "view")
    config = uvicorn.Config(application(viewer), log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
