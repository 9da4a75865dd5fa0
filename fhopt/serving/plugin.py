"""The plugin of vLLM: `register` is the entry point of the group vllm.general_plugins.

vLLM calls it in every one of its processes: the one that is asked, the engine's, each worker's.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from fhopt.errors import FhoptError
from fhopt.serving.versions import check_version

log = logging.getLogger("vllm.fhopt")


def register() -> None:
    """Register the quantization method of rewritten folders, and the caches of a plan.

    With a version of vLLM that is not supported nothing is registered, and a warning says so: other models are served.
    """
    import vllm

    try:
        check_version(vllm.__version__)
    except FhoptError as error:
        log.warning("%s", error)
        return
    from fhopt.serving import block_groups, quantization  # noqa: F401  registers the method

    block_groups.register_specs()
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say


def _say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an error that the user can correct as one line, and others as ever."""
    if isinstance(error, FhoptError):
        print(f"Error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
