"""Import of transformers without its progress bars, or with an error that says what to install."""

from __future__ import annotations

import importlib.util
from typing import Any

from fhopt.errors import FhoptError


def transformers() -> Any:
    """Import transformers without its warnings and progress bars. Raises FhoptError if it is not installed."""
    try:
        module = importlib.import_module("transformers")
    except ImportError as error:
        raise FhoptError(
            "transformers is not installed; this command requires the extra hf. Install it with: pip install "
            "'fhopt[hf]'"
        ) from error
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


class QuietProgress:
    """Context manager that hides the progress bars of transformers' loaders; the CLI has its own."""

    def __enter__(self) -> None:
        import tqdm

        self.init = tqdm.tqdm.__init__

        def silent(bar: Any, *args: Any, **kwargs: Any) -> None:
            self.init(bar, *args, **{**kwargs, "disable": True})

        tqdm.tqdm.__init__ = silent

    def __exit__(self, *_: object) -> None:
        import tqdm

        tqdm.tqdm.__init__ = self.init
