/* bench [-t SECONDS] [-n REPEATS] [-c COPIES] [KERNEL...]
 *
 * Runs each kernel (all, if none is named) in COPIES processes at once, each pinned to a CPU of its
 * own and started at a barrier, for at least SECONDS (default 2) or exactly REPEATS times, and prints
 * one line a kernel and copy:
 *
 *   bench kernel=sha256 copies=2 copy=0 cpu=0 reps=91 seconds=2.004512 check=0123456789abcdef instructions=-
 *
 * `check` depends on all of the work of one repetition and is the same on every machine. `instructions`
 * is the number this CPU retired in all repetitions, where the machine tells it by CPUID (Atoll does).
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <inttypes.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

enum { MAX_COPIES = 64 };

struct result {
    uint64_t reps, check, instructions;
    double seconds;
    int cpu, done, counted, steady;
};

struct shared {
    atomic_int arrived;
    struct result results[MAX_COPIES];
};

static const struct kernel *const families[] = {
    integer_kernels, memory_kernels, float_kernels, system_kernels,
};

/* The order of the tables that the results are compared with. */
static const char *const order[] = {
    "sha256", "nbody", "sieve", "qsort", "chase", "memcpy", "icall", "x87", "syscall", "fork", "pagefault",
};

static const struct kernel *find(const char *name)
{
    for (size_t f = 0; f < sizeof families / sizeof *families; f++)
        for (const struct kernel *k = families[f]; k->name; k++)
            if (strcmp(k->name, name) == 0)
                return k;
    return NULL;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Instructions retired by this virtual CPU: leaf 40000080h of Atoll, EAX = "ATOL", EDX:ECX = count. */
static int instructions(uint64_t *count)
{
    unsigned a, b, c, d;
    __cpuid(1, a, b, c, d);
    if (!(c & 1u << 31)) /* no hypervisor, no hypervisor leaves */
        return 0;
    __cpuid(0x40000080, a, b, c, d);
    *count = (uint64_t)d << 32 | c;
    return a == 0x4c4f5441;
}

static int nth_cpu(int n) /* the n-th CPU that we may run on, around again if there are fewer */
{
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    n %= CPU_COUNT(&allowed);
    for (int cpu = 0;; cpu++)
        if (CPU_ISSET(cpu, &allowed) && n-- == 0)
            return cpu;
}

static void copy(const struct kernel *k, struct shared *shared, int index, int copies, double seconds, long reps)
{
    struct result *r = &shared->results[index];
    cpu_set_t pin;
    r->cpu = nth_cpu(index);
    CPU_ZERO(&pin);
    CPU_SET(r->cpu, &pin);
    sched_setaffinity(0, sizeof pin, &pin);
    if (k->setup)
        k->setup();
    r->check = k->run(); /* warms caches and translations up */
    r->steady = 1;
    atomic_fetch_add(&shared->arrived, 1);
    while (atomic_load(&shared->arrived) < copies)
        sched_yield();
    uint64_t first = 0, last = 0;
    r->counted = instructions(&first);
    double begun = now();
    do {
        r->steady &= k->run() == r->check;
        r->reps++;
        r->seconds = now() - begun;
    } while (reps ? (long)r->reps < reps : r->seconds < seconds);
    if (r->counted && instructions(&last))
        r->instructions = last - first;
    r->done = 1;
}

static int measure(const struct kernel *k, int copies, double seconds, long reps)
{
    struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        perror("bench: mmap");
        return 1;
    }
    for (int i = 0; i < copies; i++) {
        pid_t child = fork();
        if (child < 0) {
            perror("bench: fork");
            atomic_fetch_add(&shared->arrived, 1); /* nobody may wait for it */
        }
        if (child == 0) {
            copy(k, shared, i, copies, seconds, reps);
            _exit(0);
        }
    }
    while (wait(NULL) > 0)
        ;
    int bad = 0;
    for (int i = 0; i < copies; i++) {
        struct result *r = &shared->results[i];
        char counted[24] = "-";
        if (r->counted)
            snprintf(counted, sizeof counted, "%" PRIu64, r->instructions);
        if (!r->done || !r->steady) {
            printf("bench kernel=%s copies=%d copy=%d failed: %s\n", k->name, copies, i,
                   r->done ? "results differ between repetitions" : "it died");
            bad = 1;
            continue;
        }
        printf("bench kernel=%s copies=%d copy=%d cpu=%d reps=%" PRIu64 " seconds=%.6f check=%016" PRIx64
               " instructions=%s\n",
               k->name, copies, i, r->cpu, r->reps, r->seconds, r->check, counted);
    }
    fflush(stdout);
    munmap(shared, sizeof *shared);
    return bad;
}

int main(int argc, char **argv)
{
    double seconds = 2.0;
    long reps = 0;
    int copies = 1, option, bad = 0;
    while ((option = getopt(argc, argv, "t:n:c:")) != -1) {
        switch (option) {
        case 't': seconds = atof(optarg); break;
        case 'n': reps = atol(optarg); break;
        case 'c': copies = atoi(optarg); break;
        default: return 2;
        }
    }
    if (copies < 1 || copies > MAX_COPIES || seconds < 0 || reps < 0) {
        fprintf(stderr, "bench: -c takes 1 to %d, -t and -n nothing negative\n", MAX_COPIES);
        return 2;
    }
    for (int i = optind; i < argc; i++)
        if (!find(argv[i])) {
            fprintf(stderr, "bench: no kernel %s\n", argv[i]);
            return 2;
        }
    for (int i = optind; i < argc; i++)
        bad |= measure(find(argv[i]), copies, seconds, reps);
    if (optind == argc)
        for (size_t i = 0; i < sizeof order / sizeof *order; i++)
            bad |= measure(find(order[i]), copies, seconds, reps);
    return bad;
}
