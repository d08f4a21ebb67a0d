"""The ``atoll`` command: one file a subcommand."""
