"""Devices, the cost model, and which kernel runs where."""
