"""The seams of transformers: apply, load, the quantizer, saved prompt caches."""
