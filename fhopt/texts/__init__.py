"""Texts for calibration and tests: built in, from files, as tokens."""
