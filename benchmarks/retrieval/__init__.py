"""Benchmarks of page selection and the retrieval LM head."""
