/* A batch: NBD requests that need nothing but bytes moved between a connection's buffers and a file.
 *
 * Source: NBD protocol, "Transmission phase" (request and reply messages); "Qcow2 Image File Format",
 * "Cluster mapping" (entries of L1 and L2 tables).
 *
 * batch_plan reads requests from the input until one is not plain, and notes where their bytes lie; the
 * caller holds whatever keeps the tables from changing. batch_run moves the bytes, in the requests' order,
 * and puts replies into the output; the caller keeps what was planned from being given to anybody else.
 * Whatever is out of the ordinary (a flag, a refusal, a cluster without a place of its own, a failed or
 * short transfer) ends the batch in front of the request that has it: that request is untouched, as far as
 * the client can tell, and is to be served by other means. So no error is ever told from here.
 *
 * Nothing here is shared between threads: a batch belongs to one connection. */
#pragma once
#include <stdint.h>

#define BATCH_REQUESTS 256
#define BATCH_SEGMENTS 1024

/* Bytes of a request that lie in a row in the file; or that are zero, and in no file. */
struct batch_segment {
    uint64_t host;
    uint32_t length;
    uint32_t zero;
};

struct batch_request {
    uint64_t cookie;
    uint64_t offset;
    uint32_t length;
    uint32_t payload;  /* where a write's data begins in the input */
    uint32_t segments; /* how many of batch.segments are its own, following those before it */
    uint32_t writes;   /* write, else read */
};

/* qcow2 tables in memory, entries in the host's byte order. */
struct batch_tables {
    const uint64_t *l1;
    uint64_t l1_size;
    const uint64_t *tables; /* by L1 index: address of the L2 table's entries, 0 when not in memory */
    uint64_t allocated;     /* any of these bits makes a standard cluster an allocated one */
    uint32_t cluster_bits;
    uint32_t table_bits;
    uint32_t zero_flag; /* version 3: bit 0 of an entry means zeroes */
    uint32_t backed;    /* what is not allocated is read from another file */
};

struct batch {
    /* set once */
    const uint8_t *input;
    uint8_t *output;
    uint32_t output_size;
    uint32_t enough; /* no request is done when so many bytes of replies wait */
    uint32_t structured;
    int32_t fd;
    uint64_t size;        /* of the disk */
    uint64_t writes_from; /* a write that begins below is not plain; UINT64_MAX: read-only */
    /* in: what waits in input and output; out: the same behind the requests that are done */
    uint32_t begin, end;
    uint32_t ready;
    /* out */
    uint32_t planned, done;
    uint64_t reads, read_bytes, writes, write_bytes; /* of those done */
    struct batch_request requests[BATCH_REQUESTS];
    struct batch_segment segments[BATCH_SEGMENTS];
};

/* Plan as many requests as are plain; tables is NULL for a raw image. Returns their number. */
uint32_t batch_plan(struct batch *batch, const struct batch_tables *tables);

/* Note, as far as they are reads and writes without flags that lie on the disk, the requests that wait, without
 * asking where their bytes lie; none of them can be run. Returns their number. */
uint32_t batch_peek(struct batch *batch);

/* Do what was planned, as far as there is room for replies; all of it is announced when the first read has to
 * wait for the disk. Returns how many requests were done. */
uint32_t batch_run(struct batch *batch);
