"""Provides the baselines of memories, and finds their shapes of equal cost."""
