"""`python -m eventlens_ds.train`: one rank of a training run, for deepspeed, torchrun and srun.

In: --config, settings, and the variables of the launcher; --local_rank, which the deepspeed launcher adds, is
accepted and ignored, because LOCAL_RANK says the same. Out: the exit code of the run.
Decision: nothing but a call, so that `eventlens train` and this door cannot differ (train/door.py).
"""

import sys

from eventlens_ds.runtime.failures import leave
from eventlens_ds.train.door import main

if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
