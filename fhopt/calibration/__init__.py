"""Calibration: runs a model over text to collect the statistics that plans are fitted to."""
