"""What leaves for other programs: folders that work where this package is not installed."""
