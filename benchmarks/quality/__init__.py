"""Perplexity and KL divergence of plans and of other methods."""
