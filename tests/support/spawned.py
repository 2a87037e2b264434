"""What spawned processes run: they find this module on their path, and no test's."""

import torch


def gives_the_same(model, inputs, wanted, same):
    """Set ``same`` if a model that was sent here gives the outputs that it gave where it came from."""
    for name, x in model(*inputs).items():
        torch.testing.assert_close(x, wanted[name])
    same.value = True
