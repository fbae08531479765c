"""`rayvaec train` as a job on a cluster.

    ray job submit --working-dir . -- python jobs/train.py \
        '$RAYVAEC_STORAGE/store' --out '$RAYVAEC_STORAGE/run' --num-workers 4 --use-gpu

Arguments and exit codes are those of the command; on a laptop, without a cluster, it does the same.
The job runs in a copy of the working folder that goes away: paths must be absolute, on storage that
every node sees. Variables of the cluster, such as $RAYVAEC_STORAGE, are expanded here, because
`ray job submit` quotes the words of the command. To go on after the cluster was lost, submit the
same command with --resume.
"""

import os
import sys

from rayvaec.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *map(os.path.expandvars, sys.argv[1:])]))
