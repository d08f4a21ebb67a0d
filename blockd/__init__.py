"""The block daemon: disk images served as NBD exports."""

import os

# numpy's linear algebra, which nothing here uses, starts a thread for each processor while it is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
