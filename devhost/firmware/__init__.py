"""What firmware is told of the machine: fw_cfg and the ACPI tables."""
