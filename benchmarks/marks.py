"""What benchmarks of a GPU are marked with."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: not run")
# peers may warn about themselves
lenient = pytest.mark.filterwarnings("default")
