"""The standard VGA card with Bochs VBE extensions (PCI 1234:1111)."""
