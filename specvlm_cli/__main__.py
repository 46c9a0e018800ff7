"""`python -m specvlm_cli`, the same as the `specvlm` command."""

import sys

from specvlm_cli.app import main

sys.exit(main())
