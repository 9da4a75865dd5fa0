"""Run the checks of a test file in several processes of one machine, for tests of distributed code.

The processes fork off one process that has done only the slow imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch

SECONDS = 240
NOT_RUN = "not run: a check before it failed"
IMPORTS = ["torch.distributed.tensor", "transformers.models.llama.modeling_llama", "fhopt.hf.prompt_cache", "fhopt.cli"]
IMPORTS += ["fhopt.calibration.run", "fhopt.evaluation.tasks"]


def launch(file: str, count: int, folder: Path, *arguments: str, may_end: bool = False) -> None:
    """Run `file` in `count` processes with torchrun's environment variables, sharing `folder`.

    may_end: any process but the first may end with an error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    known = {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    told = [known | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    workers = [context.Process(target=_run, args=(file, (str(folder), *arguments), one)) for one in told]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
            as_wished = worker.exitcode == 0 or (may_end and worker is not workers[0])
            assert as_wished, f"process {worker.pid} ended with {worker.exitcode}; see its standard error"
    finally:
        for worker in workers:
            worker.kill()


def _run(file: str, arguments: tuple[str, ...], known: dict[str, str]) -> None:
    os.environ.update(known)
    sys.argv = [file, *arguments]
    torch.set_num_threads(1)
    runpy.run_path(file, run_name="__main__")


def run_checks(checks: Iterable[Callable[[Path], None]], folder: Path) -> None:
    """Run checks in one of the processes until one fails, and write the outcome of each to a file."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS / 2))
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for check in checks:
        torch.manual_seed(0)
        told = ""
        try:
            check(folder)
        except BaseException:
            told = traceback.format_exc()
        (folder / f"{check.__name__}.{rank}-of-{count}").write_text(told)
        if told:
            return
    torch.distributed.destroy_process_group()


def outcome(check: str, count: int, folder: Path) -> str:
    """Errors of a check in any of the processes; "" if there were none."""
    files = [folder / f"{check}.{rank}-of-{count}" for rank in range(count)]
    return "\n".join(file.read_text() if file.exists() else NOT_RUN for file in files).strip()
