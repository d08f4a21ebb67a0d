/* The laboratory's guest: the first program of a Linux that reads its CD without end by direct I/O.
 *
 * The kernel's command line says what it does:
 *   lab.sha256=HEX    of the whole CD; each pass is compared with it
 *   lab.timeout=N     seconds after which the kernel gives up a command to the drive; 0: as it likes
 *   lab.gap_ms=N      report gaps of the clock from here on
 *   lab.fill=MIB      memory that is filled once
 *   lab.dirty=MIB     memory that is written again and again, at lab.dirty_rate=MIB a second
 *   lab.beside=PATH   another program that is started beside this one
 * Lines for the host:
 *   @ready TSC BYTES            the CD is there; reading begins
 *   @read TSC COUNT             COUNT reads have completed since the last such line, the last one at TSC; said
 *                               at the first read that completes 5 ms or more after the last line
 *   @error TSC ERRNO OFFSET     a read failed; it is made again
 *   @pass TSC NUMBER HEX WORD   a pass is over; WORD is "right" or "wrong"
 * and those of watch.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "dirty.h"
#include "report.h"
#include "sha256.h"
#include "start.h"
#include "watch.h"

typedef unsigned long long u64;

enum { READ_BYTES = 64 << 10, SAY_NS = 5000000 };

static int open_cd(off_t *bytes)
{
    for (int tries = 0; tries < 100; tries++) {
        int fd = open_soon("/dev/sr0", O_RDONLY | O_DIRECT);
        if ((*bytes = lseek(fd, 0, SEEK_END)) > 0)
            return fd;
        close(fd);
        usleep(10000);
    }
    give_up("/dev/sr0");
}

/* How long the block layer waits for a command of the drive. */
static void set_timeout(unsigned seconds)
{
    FILE *file = fopen("/sys/block/sr0/device/timeout", "w");
    if (file == NULL || fprintf(file, "%u", seconds) < 0 || fclose(file) != 0)
        give_up("/sys/block/sr0/device/timeout");
}

/* Until it is read; what fails is told and made again. */
static void read_at(int fd, uint8_t *data, size_t bytes, off_t offset)
{
    for (;;) {
        ssize_t count = pread(fd, data, bytes, offset);
        if (count == (ssize_t)bytes)
            return;
        report("@error %llu %d %lld", (u64)tsc(), count < 0 ? errno : 0, (long long)offset);
        usleep(1000);
    }
}

static void read_for_ever(int fd, off_t bytes, const char *expected)
{
    static uint8_t data[READ_BYTES] __attribute__((aligned(4096)));
    uint64_t said = 0;
    unsigned count = 0;
    for (unsigned pass = 1;; pass++) {
        struct sha256 sha;
        char hex[65];
        sha256_begin(&sha);
        for (off_t at = 0; at < bytes; at += READ_BYTES) {
            size_t part = bytes - at < READ_BYTES ? (size_t)(bytes - at) : READ_BYTES;
            read_at(fd, data, part, at);
            uint64_t now = clock_ns(), stamp = tsc();
            count++;
            if (now - said >= SAY_NS) {
                report("@read %llu %u", (u64)stamp, count);
                said = now;
                count = 0;
            }
            sha256_add(&sha, data, part);
        }
        sha256_end(&sha, hex);
        report("@pass %llu %u %s %s", (u64)tsc(), pass, hex, strcmp(hex, expected) == 0 ? "right" : "wrong");
    }
}

int main(void)
{
    begin();
    off_t bytes;
    int fd = open_cd(&bytes);
    if (number("lab.timeout", 0))
        set_timeout(number("lab.timeout", 0));
    watch_kernel();
    watch_clock(number("lab.gap_ms", 8));
    if (number("lab.fill", 0))
        fill_memory(number("lab.fill", 0));
    if (number("lab.dirty", 0))
        dirty_memory(number("lab.dirty", 0), number("lab.dirty_rate", 1));
    const char *beside = word("lab.beside", NULL);
    if (beside != NULL)
        start_beside(beside);
    report("@ready %llu %lld", (u64)tsc(), (long long)bytes);
    read_for_ever(fd, bytes, word("lab.sha256", ""));
}
