"""Small random models of `transformers` to compare with."""
