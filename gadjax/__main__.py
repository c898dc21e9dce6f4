import sys

from gadjax.cli.main import main

sys.exit(main())
