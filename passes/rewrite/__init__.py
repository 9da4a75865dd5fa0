"""Passes that change the computation: compress, absorb, lower."""
