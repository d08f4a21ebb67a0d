/* Kernels that work the operating system: system calls, processes, page faults. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

enum { CALLS = 1500000, FORKS = 1700, FAULT_BYTES = 64 << 20, PAGE = 4096 };

static uint64_t syscall_run(void)
{
    uint64_t check = 0;
    long self = syscall(SYS_getpid);
    for (int i = 0; i < CALLS; i++)
        check += syscall(SYS_getpid) == self;
    return check;
}

static uint64_t fork_run(void)
{
    uint64_t check = 0;
    for (int i = 0; i < FORKS; i++) {
        pid_t child = fork();
        if (child == 0)
            _exit(i & 127);
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child)
            return 0;
        check = mix(check, (uint64_t)WEXITSTATUS(status));
    }
    return check;
}

static uint64_t fault_run(void)
{
    uint8_t *area = mmap(NULL, FAULT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        return 0;
    madvise(area, FAULT_BYTES, MADV_NOHUGEPAGE);
    uint64_t check = 0;
    for (uint32_t offset = 0; offset < FAULT_BYTES; offset += PAGE) {
        check += area[offset];
        area[offset] = 1;
    }
    for (uint32_t offset = 0; offset < FAULT_BYTES; offset += PAGE)
        check += area[offset];
    munmap(area, FAULT_BYTES);
    return check;
}

void *allocate(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "bench: no memory for %llu bytes\n", (unsigned long long)bytes);
        exit(1);
    }
    return memory;
}

const struct kernel system_kernels[] = {
    {"syscall", "system calls", NULL, syscall_run},
    {"fork", "processes", NULL, fork_run},
    {"pagefault", "page faults", NULL, fault_run},
    {0},
};
