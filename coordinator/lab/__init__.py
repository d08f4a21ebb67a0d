"""The laboratory: migrations by the hundred, measured. See docs/lab.md."""
