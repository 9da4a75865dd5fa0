"""Passes that only read: every spelling of attention, its projections, positions and masks."""
