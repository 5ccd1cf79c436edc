"""Attacks: they look for a perturbation and leave no trace in the model."""
