"""Speed on a GPU: compiled blocks and CUDA graphs of velocities (sampling.py) and of their gradients (gradients.py)."""
