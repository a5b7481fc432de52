import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # the models here are tiny: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and in subprocesses
