"""Measuring what a plan costs and gives: perplexity, tasks, speed of decoding."""
