"""Replacement of attention while a decode step is recorded."""

from __future__ import annotations

import threading

recorded = threading.local()  # .attention replaces attention on the cache in this thread
