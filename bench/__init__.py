"""Benchmarks: named workloads, one way of timing them, and committed results."""
