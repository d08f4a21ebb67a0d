/* No stale translation is executed after a writer's flag has been seen (coordinator/contract/memory.c).
 * Two CPUs change one byte of code from 0 to 1 and then raise a flag, through store buffers (TSO).
 * A third translates the byte and executes it; once it has seen a flag, at its next block head it
 * executes the new byte. The membarrier of the translator drains the writers' buffers. */
#define WRITERS 2
byte code;            /* the byte in memory */
bool coded;           /* its line holds translated code */
bool page_lock;
bool event, attention;
bool flag[WRITERS];
bool buffered_code[WRITERS], buffered_flag[WRITERS]; /* store buffers, first code, then flag */

/* the hardware drains a buffer at any time, in order */
proctype drain(byte w)
{
end:
    do
    :: atomic { buffered_code[w] -> code = 1; buffered_code[w] = false }
    :: atomic { !buffered_code[w] && buffered_flag[w] -> flag[w] = true; buffered_flag[w] = false }
    od
}

proctype writer(byte w)
{
    buffered_code[w] = true;                 /* the store */
    if                                       /* then the test; a load may pass the buffered store */
    :: coded ->
        atomic { !page_lock -> page_lock = true };
        !buffered_code[w];                   /* a locked instruction drains the buffer */
        event = true;
        attention = true;
        coded = false;
        page_lock = false
    :: else
    fi;
    buffered_flag[w] = true
}

active proctype executor()
{
    bool have, seen;
    byte block, rounds;
    do
    :: rounds == 5 -> break
    :: else ->
        rounds++;
        seen = flag[0] || flag[1];           /* what the guest has read before this block head */
        if                                   /* block head */
        :: attention ->
            attention = false;
            if
            :: event -> event = false; have = false
            :: else
            fi
        :: else
        fi;
        if
        :: !have ->
            atomic { !page_lock -> page_lock = true };
            if
            :: !coded ->
                coded = true;
                (!buffered_code[0] && !buffered_code[1]) /* membarrier */
            :: else
            fi;
            page_lock = false;
            block = code;
            have = true
        :: else
        fi;
        assert(!seen || block == 1)
    od
}

init { atomic { run drain(0); run drain(1); run writer(0); run writer(1) } }
