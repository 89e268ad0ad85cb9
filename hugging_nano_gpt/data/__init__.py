"""Token files and the windows that nanoGPT's get_batch samples from them; needs torch and numpy alone."""
