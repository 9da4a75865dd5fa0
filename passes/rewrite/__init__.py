"""Passes that change what is computed: compress, absorb, lower."""
