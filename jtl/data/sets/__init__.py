"""Data sets that ship with a name, and controlled distribution shifts."""
