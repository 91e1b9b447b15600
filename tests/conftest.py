import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "experiments")]
torch.set_num_threads(1)                # the models are so small that a second thread costs time
os.environ["OMP_NUM_THREADS"] = "1"     # also in the commands that tests start
