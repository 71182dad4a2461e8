"""From examples to arrays: texts, pairs of texts, windows, images, waveforms and spectrograms."""
