"""The chips of the PC board: one chip a file, each pure (a clock and pins are handed in)."""
