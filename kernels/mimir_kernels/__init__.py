"""Triton kernels of mimir_fast, one file an op. Import a module only where it runs: this needs triton."""
