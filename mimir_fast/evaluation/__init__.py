"""Evaluation: attacks, gradient-masking checks and the report. `run.py` puts them together."""
