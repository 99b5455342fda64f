"""Finds out what an accelerator does with the library: what is fast, what is right, how fast it is."""
