"""Data sets that ship with a name, and controlled shifts of them."""
