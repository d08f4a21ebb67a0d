"""Write leases: at most one VM may write an image, over hosts and in time.

    record.py     what a lease says
    host.py       who we are, and whether a holder is proven dead
    slot.py       the records beside one image, changed by compare-and-swap
    judge.py      whose lease it is, and what tools respect
    lease.py      taking, holding, giving back
    image.py      an image that is written only while its lease is held
    manager.py    the exports of a VM with their leases
    transfer.py   handing all of them to another host
"""
