"""Configs of runs: `--config=experiments/configs/NAME.py`."""
