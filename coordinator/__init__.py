"""The conductor: configuration, life and death of the other processes, control, migration."""
