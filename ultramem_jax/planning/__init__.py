"""Plans runs on devices that are not there: a compiled step, its bytes, its traffic and its time."""
