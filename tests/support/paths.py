"""Names the folders that tests read."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
FIXTURES = pathlib.Path(os.environ.get("ULTRAMEM_FIXTURES", ROOT.parent / "shared" / "fixtures"))
"""Holds reference vectors of the authors' layers, where they are there at all."""
