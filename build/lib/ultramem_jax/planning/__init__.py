"""Plans training runs without their devices: a compiled step, its bytes, its traffic and its time."""
