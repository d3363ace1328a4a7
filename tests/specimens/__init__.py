"""Calls of every Triton kernel at the sizes of real models, one file per file of kernels/.

Each file has `specimens(dtype)`: yields (name, function); the function calls the operation and its backward
pass on tensors of the meta device, so it costs nothing, and the launchers choose their block sizes as they
would on a GPU. MATRIX names the kernels that multiply matrices (they must compile to matrix instructions:
wgmma on an H100). SMALL_MATRIX, if there, names those whose blocks may have too few rows for wgmma; any
matrix instruction will do.
"""
