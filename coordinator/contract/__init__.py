"""What the processes agree on; imports nothing else of the project."""
