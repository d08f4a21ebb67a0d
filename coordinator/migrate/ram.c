/* Guest memory as a stream of frames: see ram.h. */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "ram.h"

#define PAGE 4096u
#define LANES 8
/* bytes that memory is asked for ahead of its use, past the ends of pages, where the processor's own prefetching stops: half
 * as fast again on guest memory, which no cache holds; a prefetch never faults (Intel's instruction set reference, PREFETCHh) */
#define AHEAD 512

/* ---- checksum: lanes of xor and odd multiplication, each step a bijection of its lane; as many lanes as hide the
 * multiplier's latency ---- */
static uint64_t mix(uint64_t x)
{
    x ^= x >> 32;
    x *= UINT64_C(0xd6e8feb86659fd93);
    return x ^ x >> 29;
}

uint64_t ram_sum(const void *data, uint64_t n, uint64_t seed)
{
    const uint64_t odd = UINT64_C(0x9e3779b97f4a7c15);
    const uint8_t *at = data, *end = at + n;
    uint64_t word, sum = seed ^ n;
    uint64_t lane[LANES] = {seed ^ 1, seed ^ 2, seed ^ 3, seed ^ 4, seed ^ 5, seed ^ 6, seed ^ 7, seed ^ 8};
    for (; at < end; at += 8 * LANES) {
        __builtin_prefetch(at + AHEAD);
#pragma GCC unroll 8 /* the lanes stay in registers: more than twice as fast */
        for (unsigned l = 0; l < LANES; l++) {
            memcpy(&word, at + 8 * l, sizeof word);
            lane[l] = (lane[l] ^ word) * odd;
            lane[l] ^= lane[l] >> 31;
        }
    }
    for (unsigned l = 0; l < LANES; l++) {
        sum = mix(sum ^ mix(lane[l]));
    }
    return sum;
}

static uint64_t frame_sum(const struct ram_frame *frame, const void *pages)
{
    uint64_t head[8] = {frame->magic, (uint64_t)frame->kind << 32 | frame->round, frame->first, frame->count};
    uint64_t sum = ram_sum(head, sizeof head, 0);
    return pages ? ram_sum(pages, frame->count * PAGE, sum) : sum;
}

int ram_populate(void *guest, uint64_t first, uint64_t count, int write)
{
    uint8_t *at = (uint8_t *)guest + first * PAGE;
    return madvise(at, count * PAGE, write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) ? -errno : 0;
}

/* ---- sending ---- */
static bool is_zero(const uint8_t *page)
{
    /* equal to itself moved by a word, and the first word zero */
    uint64_t first;
    memcpy(&first, page, sizeof first);
    return first == 0 && memcmp(page, page + 8, PAGE - 8) == 0;
}

static int send_frame(int fd, struct ram_frame *frame, const void *pages, struct ram_counts *counts)
{
    uint64_t size = frame->kind == RAM_PAGES ? frame->count * PAGE : 0;
    frame->magic = RAM_MAGIC;
    frame->sum = frame_sum(frame, size ? pages : NULL);
    struct iovec parts[2] = {{frame, sizeof *frame}, {(void *)(uintptr_t)pages, size}};
    struct iovec *part = parts;
    int left = size ? 2 : 1;
    while (left) {
        ssize_t sent = writev(fd, part, left);
        if (sent < 0) {
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        while (left && (size_t)sent >= part->iov_len) {
            sent -= (ssize_t)part->iov_len;
            part++;
            left--;
        }
        if (left) {
            part->iov_base = (char *)part->iov_base + sent;
            part->iov_len -= (size_t)sent;
        }
    }
    counts->bytes += sizeof *frame + size;
    return 0;
}

int ram_send(int fd, const void *guest, uint64_t first, uint64_t count, uint32_t round, struct ram_counts *counts)
{
    const uint8_t *base = guest;
    uint64_t at = first, end = first + count;
    while (at < end) {
        struct ram_frame frame = {.round = round, .first = at};
        bool zero = is_zero(base + at * PAGE);
        uint64_t most = zero || end - at < RAM_MOST ? end : at + RAM_MOST;
        while (++at < most && is_zero(base + at * PAGE) == zero) {
            __builtin_prefetch(base + (at + 8) * PAGE);
        }
        frame.kind = zero ? RAM_ZERO : RAM_PAGES;
        frame.count = at - frame.first;
        int error = send_frame(fd, &frame, base + frame.first * PAGE, counts);
        if (error) {
            return error;
        }
        *(zero ? &counts->zero : &counts->normal) += frame.count;
    }
    return 0;
}

int ram_send_end(int fd, uint32_t round, const struct ram_counts *counts)
{
    struct ram_counts ignored = {0};
    struct ram_frame frame = {.kind = RAM_END, .round = round, .first = counts->normal, .count = counts->zero};
    return send_frame(fd, &frame, NULL, &ignored);
}

/* ---- receiving ---- */
static int receive(int fd, void *to, uint64_t n)
{
    uint8_t *at = to;
    while (n) {
        ssize_t got = read(fd, at, n);
        if (got == 0) {
            return RAM_ENDED;
        }
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        at += got;
        n -= (uint64_t)got;
    }
    return 0;
}

/* Notes that the pages came in this round; false: one did already. Connections share `seen`, each page belongs to one. */
static bool note(uint8_t *seen, const struct ram_frame *frame)
{
    uint8_t mark = (uint8_t)(frame->round % 255 + 1);
    for (uint64_t i = 0; i < frame->count; i++) {
        if (__atomic_exchange_n(&seen[frame->first + i], mark, __ATOMIC_RELAXED) == mark) {
            return false;
        }
    }
    return true;
}

static int take_pages(int fd, uint8_t *guest, const struct ram_frame *frame, struct ram_counts *counts)
{
    uint8_t *pages = guest + frame->first * PAGE;
    int error = receive(fd, pages, frame->count * PAGE);
    if (error) {
        return error;
    }
    counts->normal += frame->count;
    counts->bytes += frame->count * PAGE;
    return frame_sum(frame, pages) == frame->sum ? 0 : RAM_BAD_SUM;
}

static void take_zeroes(uint8_t *guest, const struct ram_frame *frame, struct ram_counts *counts)
{
    counts->zero += frame->count;
    if (frame->round == 0) {
        return; /* memory was empty before, and reading or writing it would give it pages */
    }
    for (uint64_t i = 0; i < frame->count; i++) {
        uint8_t *page = guest + (frame->first + i) * PAGE;
        if (!is_zero(page)) {
            memset(page, 0, PAGE);
        }
    }
}

int ram_receive(int fd, void *guest, uint64_t pages, uint32_t round, uint8_t *seen, struct ram_counts *counts)
{
    struct ram_counts mine = {0};
    int error = 0;
    while (!error) {
        struct ram_frame frame;
        error = receive(fd, &frame, sizeof frame);
        if (error) {
            break;
        }
        mine.bytes += sizeof frame;
        if (frame.magic != RAM_MAGIC || frame.round != round || (frame.kind != RAM_PAGES && frame_sum(&frame, NULL) != frame.sum)) {
            error = RAM_BAD_FRAME;
        } else if (frame.kind == RAM_END) {
            error = frame.first == mine.normal && frame.count == mine.zero ? 0 : RAM_BAD_COUNT;
            break;
        } else if (frame.count == 0 || frame.first >= pages || frame.count > pages - frame.first ||
                   (frame.kind == RAM_PAGES && frame.count > RAM_MOST)) {
            error = RAM_BAD_RANGE;
        } else if (frame.kind != RAM_PAGES && frame.kind != RAM_ZERO) {
            error = RAM_BAD_FRAME;
        } else if (!note(seen, &frame)) {
            error = RAM_TWICE;
        } else if (frame.kind == RAM_PAGES) {
            error = take_pages(fd, guest, &frame, &mine);
        } else {
            take_zeroes(guest, &frame, &mine);
        }
    }
    counts->normal += mine.normal;
    counts->zero += mine.zero;
    counts->bytes += mine.bytes;
    return error;
}
