"""Lowers a prepared graph to PyTorch's quantized dtypes and kernels, by torch.ao."""
