#include "dirty.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "report.h"

enum { PAGE = 4096, SLICE_MS = 4 };

struct work {
    volatile uint64_t *memory;
    uint64_t pages, rate;
};

static volatile uint64_t *memory(unsigned mib)
{
    void *at = mmap(NULL, (size_t)mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED)
        give_up("memory to write");
    return at;
}

static void *dirty_thread(void *argument)
{
    struct work work = *(struct work *)argument;
    const struct timespec nap = {.tv_nsec = SLICE_MS * 1000000};
    uint64_t begun = clock_ns(), done = 0;
    for (;;) {
        uint64_t due = (clock_ns() - begun) / 1000 * work.rate / 1000000;
        if (due - done > work.rate) /* time that was jumped over is not made up for */
            done = due - work.rate * SLICE_MS / 1000;
        for (; done < due; done++)
            work.memory[done % work.pages * (PAGE / 8)] = done;
        nanosleep(&nap, NULL);
    }
    return NULL;
}

void dirty_memory(unsigned mib, unsigned rate)
{
    static struct work work;
    pthread_t thread;
    work = (struct work){memory(mib), (uint64_t)mib << 8, (uint64_t)rate << 8};
    if ((errno = pthread_create(&thread, NULL, dirty_thread, &work)) != 0)
        give_up("thread");
}

void fill_memory(unsigned mib)
{
    volatile uint64_t *at = memory(mib);
    uint64_t word = 0x9e3779b97f4a7c15u;
    for (uint64_t i = 0; i < (uint64_t)mib << 17; i++) {
        word ^= word << 13, word ^= word >> 7, word ^= word << 17; /* xorshift64 */
        at[i] = word;
    }
}
