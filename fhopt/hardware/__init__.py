"""Devices, the cost model of a decode step, and the table of a plan's kernels on a device."""
