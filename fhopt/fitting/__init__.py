"""Mathematics of fitting: statistics, bases, bit allocation, plans. No model and no data."""
