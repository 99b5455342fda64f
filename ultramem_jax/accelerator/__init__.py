"""Measures the library on this machine's accelerator, and compares its results with the CPU."""
