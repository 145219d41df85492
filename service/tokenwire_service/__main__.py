"""`python -m tokenwire_service` is the command `tokenwire`."""

import sys

from tokenwire_service.cli import main

sys.exit(main())
