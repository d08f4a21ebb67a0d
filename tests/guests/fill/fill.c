/* fill MIB: has MIB of memory in use, and keeps looking whether it still holds what was written.
 *
 * Half of the bits of each word are drawn from the page's number, half are zero: neither empty nor random through and
 * through, as memory is. Prints "atoll: filled MIB", then "atoll: tick N" ten times a second, each after a look at 4 MiB
 * in turn, or "atoll: damaged PAGE".
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, WORDS = PAGE / 8, LOOK = 1024 };

/* xorshift64 (Marsaglia 2003, "Xorshift RNGs"); never zero, so no word is */
static uint64_t next(uint64_t x)
{
    x ^= x << 13;
    x ^= x >> 7;
    return x ^ x << 17;
}

static uint64_t seed(uint64_t page) { return page * 2 + 1; }

static void write_page(uint64_t *to, uint64_t page)
{
    uint64_t x = seed(page);
    for (int i = 0; i < WORDS; i++) {
        x = next(x);
        to[i] = x & 0xffffffff;
    }
}

static int is_whole(const uint64_t *at, uint64_t page)
{
    uint64_t x = seed(page), wrong = 0;
    for (int i = 0; i < WORDS; i++) {
        x = next(x);
        wrong |= at[i] ^ (x & 0xffffffff);
    }
    return !wrong;
}

int main(int argc, char **argv)
{
    uint64_t mib = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, pages = mib << 8;
    uint64_t *memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        puts("atoll: no memory to fill");
        return 1;
    }
    setlinebuf(stdout);
    for (uint64_t page = 0; page < pages; page++) {
        write_page(memory + page * WORDS, page);
    }
    printf("atoll: filled %llu\n", (unsigned long long)mib);
    for (uint64_t tick = 1, page = 0;; tick++) {
        for (int i = 0; i < LOOK; i++, page = (page + 1) % pages) {
            if (!is_whole(memory + page * WORDS, page)) {
                printf("atoll: damaged %llu\n", (unsigned long long)page);
            }
        }
        printf("atoll: tick %llu\n", (unsigned long long)tick);
        nanosleep(&(struct timespec){.tv_nsec = 100 * 1000 * 1000}, NULL);
    }
}
