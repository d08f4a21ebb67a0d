"""PCI: configuration space, the i440FX host bridge and the PIIX3 ISA bridge."""
