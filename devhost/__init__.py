"""Device models and the process that serves them over the bus."""
