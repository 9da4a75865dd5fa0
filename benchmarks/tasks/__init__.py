"""Task accuracy of models with plans."""
