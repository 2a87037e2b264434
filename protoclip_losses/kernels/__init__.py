"""Streamed kernels: blocks of rows, no B x K or B x B tensor; opaque to autograd and torch.compile as custom operators."""
