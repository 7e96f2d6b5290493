import sys

from twolevel.cli import main

sys.exit(main())
