"""Provides what every report needs: tables in Markdown, folders, and a description of the machine."""
