"""Benchmarks: one file a question, one table, one line of JSON a number.

    python -m benchmarks                      the quick ones, on this machine
    python -m benchmarks hsic linf_step       some of them
    python -m benchmarks --full --compare benchmarks/results/cpu.jsonl
    python -m benchmarks --device-suite --device cuda

How a number comes about: every provider of a case is held against the definition in float64 first (`gate.py`), then
all are timed in turn in one process (`timing.py`), beside the ceilings of this very machine (`ceilings.py`).
"""
