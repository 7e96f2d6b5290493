from twolevel.cli import entry

if __name__ == "__main__":  # processes that compile kernels import this file too
    entry()
