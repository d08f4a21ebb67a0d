/*
 * Guest memory as a stream of frames, sent from the segment and received straight into it. cffi reads this text, so it holds
 * nothing but integer #defines, structs and prototypes.
 *
 * A frame is a header, and behind a RAM_PAGES one the pages themselves. Pages are addressed and rounds numbered, so that several
 * connections can share the work and pre-copy is the same stream. All numbers are little-endian, as on every host we run on.
 */
#define RAM_MAGIC 0x4d41524c4c4f5441 /* "ATOLLRAM" */
#define RAM_PAGES 1      /* `count` pages from `first` follow */
#define RAM_ZERO 2       /* they are zero: not written on arrival in round 0 */
#define RAM_END 3        /* of this connection's share of round `round`; first, count: PAGES and ZERO pages sent in it */
#define RAM_MOST 64      /* pages of a RAM_PAGES frame: what stays in a cache between receiving and checking */

struct ram_frame {
    uint64_t magic;
    uint32_t kind;
    uint32_t round;
    uint64_t first;
    uint64_t count;
    uint64_t sum;        /* of the pages; then of this header with sum = 0 mixed in: ram_sum() */
};

struct ram_counts {
    uint64_t normal, zero;   /* pages */
    uint64_t bytes;          /* on the wire, frames included */
};

/* 64 bits over n bytes (a multiple of 64): finds any change within one word for certain, others but for 2^-64. */
uint64_t ram_sum(const void *data, uint64_t n, uint64_t seed);

/*
 * Makes this process's page tables ready for pages [first, first + count), so that no fault is taken later: to read what is
 * there, or, with `write`, to write, which also allocates. 0, or -errno (madvise(2), MADV_POPULATE_READ and _WRITE).
 */
int ram_populate(void *guest, uint64_t first, uint64_t count, int write);

/* Sends pages [first, first + count) of guest memory in frames. Counts are added to. 0, or -errno. */
int ram_send(int fd, const void *guest, uint64_t first, uint64_t count, uint32_t round, struct ram_counts *counts);
/* Ends this connection's share of a round; counts are those of the round. */
int ram_send_end(int fd, uint32_t round, const struct ram_counts *counts);

#define RAM_BAD_FRAME 1  /* what ram_receive() returns beside 0 and -errno */
#define RAM_BAD_SUM 2
#define RAM_BAD_RANGE 3
#define RAM_BAD_COUNT 4
#define RAM_ENDED 5      /* the peer closed before RAM_END */
#define RAM_TWICE 6      /* a page came twice in a round */
/*
 * Receives one connection's share of round `round` into guest memory of `pages` pages, up to RAM_END. seen: a byte a page, all
 * connections' together: the last round that brought it + 1. Nothing outside of guest memory is written, whatever comes.
 */
int ram_receive(int fd, void *guest, uint64_t pages, uint32_t round, uint8_t *seen, struct ram_counts *counts);
