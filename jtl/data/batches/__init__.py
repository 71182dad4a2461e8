"""From arrays to batches: the loader, mixtures of domains, mixup and few-shot episodes."""
