/* A fault that cannot be delivered, nor the double fault that follows. */
#include "guest.h"

int main(void)
{
    struct { u16 limit; u64 base; } __attribute__((packed)) none = {0, 0};
    print("falling\n");
    asm volatile("lidt %0; ud2" : : "m"(none));
    return 1;
}
