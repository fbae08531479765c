"""`rayvaec sample` as a job on a cluster.

    ray job submit --working-dir . -- python jobs/sample.py '$RAYVAEC_STORAGE/run/model' \
        '$RAYVAEC_STORAGE/store' --out '$RAYVAEC_STORAGE/draws.zarr' --n-samples 20 --num-workers 8

Arguments and exit codes are those of the command; on a laptop, without a cluster, it does the same.
The job runs in a copy of the working folder that goes away: paths must be absolute, on storage that
every node sees. Variables of the cluster, such as $RAYVAEC_STORAGE, are expanded here, because
`ray job submit` quotes the words of the command. A job that was stopped goes on where it was when
the same command is submitted again.
"""

import os
import sys

from rayvaec.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *map(os.path.expandvars, sys.argv[1:])]))
