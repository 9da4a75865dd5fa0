"""The mathematics of fitting: statistics, bases, allocation of bits, plans. No model, no data."""
