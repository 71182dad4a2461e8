"""Arrays to batches: the loader, mixtures of data sets and episodes."""
