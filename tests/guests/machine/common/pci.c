/* PCI configuration by mechanism 1 (PCI 2.2, section 3.2.2.3.2). */
#include "guest.h"

static u32 address(u32 device, u32 function, u32 reg) { return 1u << 31 | device << 11 | function << 8 | (reg & 0xfc); }

u32 pci_read(u32 device, u32 function, u32 reg)
{
    outl(0xcf8, address(device, function, reg));
    return inl(0xcfc);
}

void pci_write(u32 device, u32 function, u32 reg, u32 value)
{
    outl(0xcf8, address(device, function, reg));
    outl(0xcfc, value);
}
