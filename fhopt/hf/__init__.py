"""Integration with transformers: `apply`, `load`, the quantizer and prompt caches on disk."""
