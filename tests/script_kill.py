"""Start one small run for each moment of `helpers_train.KILLED` and let it be killed there.

`python script_kill.py FOLDER OPTIONS`: the runs are children of this process, in FOLDER/<moment>; a copy of what the
kill left is FOLDER/<moment>-as-left. The last line printed is JSON: the signal that ended each child.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from helpers_train import KILLED, kill_at, make_trainer


def main():
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    ended = {}
    for where in KILLED:
        child = os.fork()
        if child == 0:
            try:
                trainer = make_trainer(folder / where, **options, save_total_limit=1)
                kill_at(trainer, where)
                trainer.train()
            finally:
                os._exit(1)
        ended[where] = os.WTERMSIG(os.waitpid(child, 0)[1])
        shutil.copytree(folder / where, folder / f"{where}-as-left")
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
