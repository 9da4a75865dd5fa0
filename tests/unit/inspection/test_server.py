"""The server of a report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sample_reports
from browser import chromium, opened

from fhopt.errors import FhoptError
from fhopt.inspection import html_report, server
from fhopt.inspection.progress_file import ProgressFile, beside

uvicorn = pytest.importorskip("uvicorn", reason="the extra view is not installed: pip install 'fhopt[view]'")


@contextmanager
def serving(viewer: server.Viewer) -> Iterator[str]:
    """Run a server in a separate thread; return its address."""
    listening = server.listen()
    config = uvicorn.Config(server.application(viewer), log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)


def get(address: str, **headers: str) -> tuple[int, str, Any]:
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def state_of(address: str, until: str) -> Any:
    """Return /progress.json once `until` holds for it."""
    for _ in range(200):
        state = json.loads(get(f"{address}/progress.json")[1])
        if state[until]:
            return state
        time.sleep(0.05)
    raise AssertionError(f"{until} did not come: {state}")


def test_a_report_is_made_once_and_served(tmp_path: Path) -> None:
    made: list[bool] = []

    def make(has_plan: bool) -> str:
        made.append(has_plan)
        return "<p>the report"

    with serving(server.Viewer(make)) as address:
        state_of(address, "ready")
        assert get(address)[:2] == (200, "<p>the report")
        assert get(f"{address}/elsewhere")[0] == 404
    assert made == [False]


def test_it_listens_only_on_this_machine_and_refuses_other_names() -> None:
    listening = server.listen()
    assert listening.getsockname()[0] == "127.0.0.1"
    with pytest.raises(FhoptError, match="is unusable"):
        second = socket.socket()
        second.bind(("127.0.0.1", 0))
        second.listen()
        server.listen(second.getsockname()[1])
    listening.close()
    with serving(server.Viewer(lambda has_plan: "page")) as address:
        assert get(address, Host="evil.example")[0] == 400
        status, _, headers = get(address, Origin="http://evil.example")
        assert status == 200 and "Access-Control-Allow-Origin" not in headers
        assert (
            headers["X-Content-Type-Options"] == "nosniff"
            and "default-src 'none'" in headers["Content-Security-Policy"]
        )


def test_the_report_waits_for_a_fit_and_is_made_again_for_a_new_plan(tmp_path: Path) -> None:
    plan, made = tmp_path / "plan", list[float]()

    def make(has_plan: bool) -> str:
        assert has_plan
        made.append(time.time())
        return f"page {len(made)}"

    viewer = server.Viewer(make, plan)
    viewer.refresh()
    assert not made and not viewer.state()["making"]  # there is no plan yet
    with ProgressFile(beside(plan)).kept() as report:
        report("moments", 3, 12)
        sample_reports.synthetic_plan(2).save(plan)
        viewer.refresh()
        state = viewer.state()
        assert not made and state["fit"]["stages"][0]["done"] == 3 and not state["making"]
    viewer.refresh()
    viewer.refresh()
    assert viewer.page == "page 1" and viewer.state()["ready"]
    os.utime(plan / "plan.json", (1, 1))
    viewer.refresh()
    assert viewer.page == "page 2"


def test_an_error_is_shown_on_the_page() -> None:
    def fail(has_plan: bool) -> str:
        raise FhoptError("the plan was fitted to another model")

    viewer = server.Viewer(fail)
    viewer.refresh()
    assert viewer.state()["failure"] == "the plan was fitted to another model" and not viewer.state()["ready"]


@pytest.mark.slow
def test_a_browser_shows_progress_and_then_the_report_by_itself(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    page = html_report.page(sample_reports.synthetic_report(3))
    viewer, progress = server.Viewer(lambda has_plan: page, plan), ProgressFile(beside(plan))
    progress.record("moments", 3, 12)
    with chromium() as browser, serving(viewer) as address, opened(browser, address) as watched:
        shown = watched.page
        shown.get_by_text("3 of 12").wait_for()
        watched.keep_screenshot("progress")
        progress.record("moments", 4, 12)
        shown.get_by_text("4 of 12").wait_for()
        sample_reports.synthetic_plan(3).save(plan)
        beside(plan).unlink()
        shown.locator("#site-2").wait_for()
        shown.locator(".chart svg").first.wait_for()
        watched.expect_quiet(address)


def test_the_command_serves_a_model_until_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fhopt.cli", "view", "command_models:encoder", "--no-open"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "support"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        for _ in range(600):
            try:
                if json.loads(get(f"{address}progress.json")[1])["ready"]:
                    break
            except urllib.error.URLError:  # it does not answer yet
                pass
            time.sleep(0.2)
        assert "Encoder" in get(address)[1] or "encoder" in get(address)[1]
        process.terminate()
        process.wait(20)
    finally:
        process.kill()
