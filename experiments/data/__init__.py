"""Data sets made for these studies, shared by several of them."""
