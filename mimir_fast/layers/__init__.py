"""Layers of a transformer: modules that PyTorch's tools can hook, wrap and replace, and the fused paths beside them.

A fused path reads the weights of several modules and computes them as one op. It is taken only where nobody could tell
the difference, see `inspection.py`; everywhere else the modules are called.
"""
