"""Texts for calibration and tests: built-in texts, files, token ids."""
