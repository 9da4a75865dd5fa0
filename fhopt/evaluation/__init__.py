"""Evaluation of plans: perplexity, tasks, decode speed."""
