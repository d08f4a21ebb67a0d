/* RAM above 4 GiB, where the machine has some (-m 4608: 3 GiB below the hole, 1.5 GiB above). */
#include "guest.h"

#define FIRST (4ul << 30)
#define LAST (FIRST + (1536ul << 20) - 8)

int main(void)
{
    static const u64 places[] = {FIRST, FIRST + 4096, FIRST + 0x12345678, FIRST + (1ul << 30) - 8, FIRST + (1ul << 30), LAST,
                                 (3ul << 30) - 8, 2ul << 30, 64ul << 20};
    u32 wrong = 0;
    for (unsigned i = 0; i < COUNT(places); i++) {
        wrong += *(volatile u64 *)(places[i] & ~7ul) != 0; /* never written, and no alias of what was */
        *(volatile u64 *)(places[i] & ~7ul) = 0x1111111111111111ul * (i + 1);
    }
    for (unsigned i = 0; i < COUNT(places); i++) {
        u64 one = 1;
        asm volatile("lock xaddq %0, (%1)" : "+r"(one) : "r"(places[i] & ~7ul) : "memory", "cc");
        wrong += one != 0x1111111111111111ul * (i + 1);
    }
    check("high_memory", !wrong, "%u wrong", wrong);
    volatile u8 *code = (volatile u8 *)(FIRST + (1ul << 29) + 4093); /* runs there, across two pages */
    memcpy((void *)code, "\xb8\x78\x56\x34\x12\xc3", 6);
    u32 got = ((u32(*)(void))(u64)code)();
    memcpy((void *)code, "\xb8\x79\x56\x34\x12\xc3", 6);
    u32 then = ((u32(*)(void))(u64)code)();
    check("high_code", got == 0x12345678 && then == 0x12345679, "%x %x", got, then);
    memset((void *)(LAST + 8 - 65536), 0xa5, 65536);
    bool end = *(volatile u64 *)LAST == 0xa5a5a5a5a5a5a5a5ul, beyond = *(volatile u64 *)(LAST + 8) == ~0ul;
    check("high_end", end && beyond, "%d %d", end, beyond);
    check("hole", *(volatile u32 *)0xd0000000ul == ~0u, "%x", *(volatile u32 *)0xd0000000ul);
    return 0;
}
