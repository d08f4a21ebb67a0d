/* No wake-up is lost (coordinator/contract/attention.c, argument 1).
 * Two senders raise a bit each; a vCPU takes the bits and sleeps on the attention word when there are none.
 * Checked: no invalid end state, that is, the vCPU is never asleep for good while a bit is up. */
byte attention;
bool sleeping;
bool in_kernel; /* the vCPU is in FUTEX_WAIT and has not been woken */
byte taken;     /* bits that the vCPU has acted on */

proctype sender(byte mark)
{
    atomic { attention = attention | mark };     /* OR, seq_cst */
    if
    :: sleeping -> in_kernel = false            /* FUTEX_WAKE; harmless when nobody waits */
    :: else
    fi
}

active proctype vcpu()
{
    byte bits;
    do
    :: taken == 3 -> break
    :: else ->
        atomic { bits = attention; attention = 0 }; /* clear first, look at what they announce afterwards */
        taken = taken | bits;
        if
        :: taken == 3 -> break
        :: else
        fi;
        sleeping = true;
        if
        :: attention != 0
        :: else ->
            atomic {                            /* the kernel compares and queues under its own lock */
                if
                :: attention == 0 -> in_kernel = true
                :: else
                fi
            };
            !in_kernel                          /* asleep until woken */
        fi;
        sleeping = false
    od
}

init { atomic { run sender(1); run sender(2) } }
