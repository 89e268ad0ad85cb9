"""Exports to other programs: files and folders that work where this package is not installed."""
