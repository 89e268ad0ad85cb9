"""Files on the disk: opened, written and replaced safely, and the pickles in them read without executing anything."""
