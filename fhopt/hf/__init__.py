"""The interfaces of transformers: apply, load, the quantizer, saved prompt caches."""
