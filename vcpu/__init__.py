"""One virtual CPU a process: the C core and the loop around it."""
