"""Plans in serving engines."""
