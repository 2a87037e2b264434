"""``python -m protoclip_losses.integrations.open_clip``."""

import sys

from .launcher import main

main(sys.argv[1:])
