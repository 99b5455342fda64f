"""Provides the command line that all commands and experiments share."""
