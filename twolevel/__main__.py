from twolevel.cli import entry

entry()
