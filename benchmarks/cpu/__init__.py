"""Attention, decode steps and memory of caches on a CPU."""
