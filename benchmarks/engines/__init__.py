"""CPU speed and memory of fhopt and of other inference engines."""
