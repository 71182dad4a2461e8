"""Examples to arrays: texts, pairs, windows, images and spectrograms."""
