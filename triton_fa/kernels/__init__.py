"""Triton kernels and their launchers: one kernel for each pattern of data movement."""
