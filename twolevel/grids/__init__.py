"""Grids of training runs: the published tables, and the same at a size for two CPU cores.

declare   a grid from its TOML file: settings of `twolevel train`, and which of them vary
results   the JSON line of a finished run
runner    trains what no line is of, one run a GPU or a share of the cores
"""
