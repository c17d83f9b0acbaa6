"""Other libraries, one file each; each needs its library and is imported by name."""
