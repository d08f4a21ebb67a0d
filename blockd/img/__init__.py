"""``atoll img``: disk images from the command line, in qemu-img's spelling. One file a subcommand."""
