"""Where a score comes from, and whether to trust it."""
