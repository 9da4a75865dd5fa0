"""The vLLM plugin: `register` is the entry point of the group vllm.general_plugins.

vLLM calls it in each of its processes: front end, engine and workers.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from fhopt.errors import FhoptError
from fhopt.serving.versions import check_version

log = logging.getLogger("vllm.fhopt")


def register() -> None:
    """Register the quantization method of rewritten folders, and the cache specifications of a plan.

    With an unsupported vLLM version it registers nothing and warns; other models can be served.
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
    """Print an error that the user can fix in one line, and other errors as usual."""
    if isinstance(error, FhoptError):
        print(f"Error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
