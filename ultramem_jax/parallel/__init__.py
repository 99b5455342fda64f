"""Devices: the mesh that a run is laid over."""
