"""Benchmarks of plans in serving engines."""
