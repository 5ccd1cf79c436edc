"""Masked autoencoders and classifiers: plain modules that know nothing of losses, attacks or parallelism."""
