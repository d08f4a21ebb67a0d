"""Fuzzing of what strangers hand to blockd: qcow2 files, part by part, and the bytes of NBD clients.

``make test`` runs a few inputs of each target with a fixed seed; ``python -m tests.blockd.fuzz --seconds N
--seed S`` goes on for long and keeps an input that failed.

What counts as a failure: any exception but BlockError or OSError, more than one line of error, a process
that dies, takes more memory than it was granted or does not end; a change to a file that is not the
image's; an image that was in order and is not any more after it was used; another content than QEMU reads.
"""
