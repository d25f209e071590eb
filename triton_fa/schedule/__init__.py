"""Plain integer decisions on the host: tiles, grids, workspaces. No torch tensors, no triton."""
