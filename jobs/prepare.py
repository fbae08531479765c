"""`rayvaec prepare` as a job on a cluster.

    ray job submit --working-dir . -- python jobs/prepare.py \
        '$RAYVAEC_STORAGE/atlas.h5ad' --out '$RAYVAEC_STORAGE/store' --labels-key cell_type

Arguments and exit codes are those of the command; on a laptop, without a cluster, it does the same.
The job runs in a copy of the working folder that goes away: paths must be absolute, on storage that
every node sees. Variables of the cluster, such as $RAYVAEC_STORAGE, are expanded here, because
`ray job submit` quotes the words of the command.
"""

import os
import sys

from rayvaec.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *map(os.path.expandvars, sys.argv[1:])]))
