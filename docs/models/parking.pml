/* No vCPU uses an old map after a publication has returned (attention.c, argument 2).
 * The vCPU runs with the map it has looked at, parks and unparks at will; the publisher changes the
 * version and waits until the vCPU is parked or has acknowledged. */
byte version;
byte ack;
bool parked = true;
bool attention;
bool published; /* the publication has returned */

active proctype publisher()
{
    version = 1;
    attention = true;
    (parked || ack == 1);
    published = true
}

active proctype vcpu()
{
    byte in_use, rounds;
    do
    :: rounds == 4 -> break
    :: else ->
        rounds++;
        parked = false;             /* then look, seq_cst */
        in_use = version;
        ack = in_use;
        do                          /* blocks: attention at each head, memory accesses in between */
        :: true ->
            if
            :: attention -> attention = false; in_use = version; ack = in_use
            :: else
            fi;
            atomic { assert(!published || in_use == 1) }
        :: break
        od;
        parked = true
    od
}
