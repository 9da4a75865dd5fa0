"""Passes that make attention visible: composites taken apart, in-place changes made functional."""
