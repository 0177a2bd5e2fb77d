"""Benchmarks, run with ``./dev bench``; what they measure and their targets are in their modules."""
