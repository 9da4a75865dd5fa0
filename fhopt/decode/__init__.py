"""Decode programs: a model's decode step, captured once and run as native segments and attention on the cache."""
