"""Refinement of fitted plans: healing, loss targets, page selection."""
