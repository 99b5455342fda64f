"""Sets up the devices and processes of a run: its mesh, how parameters are sharded, what devices exchange."""
