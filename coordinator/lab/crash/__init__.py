"""Islands killed by the hundred while the guest reads and writes: ``atoll lab crash``."""
