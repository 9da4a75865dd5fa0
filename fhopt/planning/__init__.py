"""Fitting pipeline, from calibration data to a plan, and the store of fitted plans."""
