import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
torch.set_num_threads(1)    # the models here are so small that a second thread costs more than it brings
os.environ["OMP_NUM_THREADS"] = "1"    # ... in the commands that tests start, too
