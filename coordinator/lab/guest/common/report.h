/* Lines for the host, on the console: "@WORD TSC ...". TSC is the guest's time-stamp counter when it happened,
 * which the host can turn into guest time without knowing when a line came through. */
#ifndef LAB_REPORT_H
#define LAB_REPORT_H

#include <stdint.h>

static inline uint64_t tsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/* The clock that programs go by, nanoseconds. */
uint64_t clock_ns(void);

/* One whole line by one write, from any thread. */
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Nothing more can be measured: say why, for ever. */
void give_up(const char *what) __attribute__((noreturn));

#endif
