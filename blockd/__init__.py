"""The block daemon: disk images served as NBD exports."""
