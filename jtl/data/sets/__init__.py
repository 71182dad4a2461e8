"""Data sets with a short name, fetched on first use, and controlled distribution shifts."""
