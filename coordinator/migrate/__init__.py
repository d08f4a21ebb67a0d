"""Stop-copy migration: see docs/migration.md."""
