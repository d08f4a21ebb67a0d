/* Threads that observe: gaps in the guest's clock, and what its kernel says. */
#ifndef LAB_WATCH_H
#define LAB_WATCH_H

/* "@gap FROM_TSC TO_TSC NS": the clock moved on by more than gap_ms while we asked to sleep 1 ms. */
void watch_clock(unsigned gap_ms);

/* "@kmsg TSC LEVEL TEXT": each message of the kernel from now on. */
void watch_kernel(void);

#endif
