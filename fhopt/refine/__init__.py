"""What improves a fitted plan: healing, a bound on the loss, pages to select."""
