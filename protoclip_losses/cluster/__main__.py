"""``python -m protoclip_losses.cluster``."""

import sys

from . import main

main(sys.argv[1:])
